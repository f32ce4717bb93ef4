"""Example applications; see README.md beside this file."""
