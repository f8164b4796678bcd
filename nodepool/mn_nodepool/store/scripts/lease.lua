#!lua flags=allow-oom
-- The leader lease: '<counter>:<holder>' in a key that expires. The counter has a key of its own, so that it outlives every lease.
-- A full store must not depose the leader, hence allow-oom.
--   KEYS  the lease, the counter
--   ARGV  'acquire', holder, milliseconds, number that a new counter must exceed
--                                              → the lease, or nothing when it is somebody else's
--         'renew', lease, milliseconds         → 1, or 0 when it is no longer ours
--         'release', lease                     → 1 or 0

local current = redis.call('GET', KEYS[1])

if ARGV[1] == 'acquire' then
  if current then
    if string.match(current, '^%d+:(.*)$') ~= ARGV[2] then return false end
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return current
  end
  if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[4]) then redis.call('SET', KEYS[2], ARGV[4]) end
  local lease = string.format('%.0f', redis.call('INCR', KEYS[2])) .. ':' .. ARGV[2]
  redis.call('SET', KEYS[1], lease, 'PX', ARGV[3])
  return lease
end

if current ~= ARGV[2] then return 0 end
if ARGV[1] == 'renew' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
else
  redis.call('DEL', KEYS[1])
end
return 1
