"""What the Redis transport does in the server, each as one step; whatever dies, a message is in exactly one place.

All instants are the server's own. Every key is complete: kombu's ``global_keyprefix`` is not added to those of scripts.
"""

from __future__ import annotations

from typing import Final

#: Puts messages into their queue, the first one first, and wakes one idle consumer. The wake key holds one member
#: however many messages come; consumers look once in a while without it, so it may be lost, and it expires where nobody
#: consumes.
#: KEYS: queue with priority, wake key. ARGV: messages.
PUT: Final = """
redis.call('LPUSH', KEYS[1], unpack(ARGV))
redis.call('ZADD', KEYS[2], 0, 'wake')
redis.call('PEXPIRE', KEYS[2], 10000)
"""

#: Moves the first messages from their queues to what is unacknowledged, and wakes others for what is left. Beside the
#: message it keeps where it came from: ``<length of the key>:<key><message>``. Of the queues of one priority it takes
#: all of the first one, then of the next; or in turns one message of each.
#: KEYS: deliveries, their index by time, n wake keys, then for each priority the n queues. ARGV: n, how many messages,
#: after how many bytes it takes no more, a part of the delivery tags that makes them unique, 1 for in turns.
#: In the order of their tags, deliveries are in that in which they were taken: they are stamped many at an instant.
#: Returns for each message: the key it came from, its delivery tag, itself.
FETCH: Final = """
local queues, most, bytes, in_turns = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[5] == '1'
local time = redis.call('TIME')
local now = string.format('%.6f', time[1] + time[2] / 1000000)
local taken, stamps, kept, count = {}, {}, {}, 0
local function take(key)
  local message = count < most and bytes > 0 and redis.call('RPOP', key)
  if not message then
    return false
  end
  count, bytes = count + 1, bytes - #message
  local tag = string.format('%s.%s.%04d', now, ARGV[4], count)
  taken[#taken + 1], taken[#taken + 2], taken[#taken + 3] = key, tag, message
  stamps[#stamps + 1], stamps[#stamps + 2] = now, tag
  kept[#kept + 1], kept[#kept + 2] = tag, #key .. ':' .. key .. message
  return true
end
for first = queues + 3, #KEYS, queues do
  repeat
    local before = count
    for i = first, first + queues - 1 do
      while take(KEYS[i]) and not in_turns do end
    end
  until not in_turns or count == before
end
if count > 0 then
  redis.call('ZADD', KEYS[2], unpack(stamps))
  redis.call('HSET', KEYS[1], unpack(kept))
end
if count == most or bytes <= 0 then
  for i = queues + 3, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then
      local wake = KEYS[3 + (i - 3) % queues]
      redis.call('ZADD', wake, 0, 'wake')
      redis.call('PEXPIRE', wake, 10000)
    end
  end
end
return taken
"""

#: Forgets deliveries.
#: KEYS: deliveries, index. ARGV: delivery tags.
SETTLE: Final = """
redis.call('ZREM', KEYS[2], unpack(ARGV))
redis.call('HDEL', KEYS[1], unpack(ARGV))
"""

#: Says that deliveries are held, and which of them still are: others were given to somebody else.
#: KEYS: deliveries, index. ARGV: delivery tags.
CLAIM: Final = """
local time = redis.call('TIME')
local now = string.format('%.6f', time[1] + time[2] / 1000000)
local ours = {}
for _, tag in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], tag) == 1 then
    redis.call('ZADD', KEYS[2], now, tag)
    ours[#ours + 1] = tag
  end
end
return ours
"""

#: Says that deliveries are held; those that were acknowledged or taken away stay so. Returns the server's time.
#: KEYS: index. ARGV: delivery tags.
STAMP: Final = """
local time = redis.call('TIME')
local now = string.format('%.6f', time[1] + time[2] / 1000000)
for _, tag in ipairs(ARGV) do
  redis.call('ZADD', KEYS[1], 'XX', now, tag)
end
return now
"""

#: The deliveries that nobody stamped for ARGV[1] seconds, youngest first, at most ARGV[2]: tag, what is kept of it, ...
#: KEYS: deliveries, index.
OVERDUE: Final = """
local time = redis.call('TIME')
local oldest = string.format('%.6f', time[1] + time[2] / 1000000 - ARGV[1])
local found = {}
for _, tag in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[2], oldest, '-inf', 'LIMIT', 0, ARGV[2])) do
  local kept = redis.call('HGET', KEYS[1], tag)
  if kept then
    found[#found + 1] = tag
    found[#found + 1] = kept
  else
    redis.call('ZREM', KEYS[2], tag)
  end
end
return found
"""

#: Moves a delivery's message to a queue, unless somebody else did, or stamped it in the last ARGV[4] seconds (empty:
#: whenever). ARGV[3] is RPUSH for the front of the queue, LPUSH for its end. Returns 1 if it was moved.
#: KEYS: deliveries, index, queue with priority, wake key. ARGV: delivery tag, message, RPUSH or LPUSH, seconds.
RESTORE: Final = """
if ARGV[4] ~= '' then
  local time = redis.call('TIME')
  local stamped = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if stamped and tonumber(stamped) > time[1] + time[2] / 1000000 - ARGV[4] then
    return 0
  end
end
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call(ARGV[3], KEYS[3], ARGV[2])
redis.call('ZADD', KEYS[4], 0, 'wake')
redis.call('PEXPIRE', KEYS[4], 10000)
return 1
"""
