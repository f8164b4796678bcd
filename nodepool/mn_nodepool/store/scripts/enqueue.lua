-- Record an accepted invocation and queue it.
--   KEYS  waiting, states, values, sequence, the id's outcome, the dedupe key (only when there is one)
--   ARGV  id, value, queue, milliseconds to remember the dedupe key
-- Answers {id, 1}, or {the id that was there first, 0}. A repetition with the same id changes nothing.

if KEYS[6] then
  local first = redis.call('GET', KEYS[6])
  if first then return {first, 0} end
end
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 or redis.call('EXISTS', KEYS[5]) == 1 then
  return {ARGV[1], 0}
end

local sequence = redis.call('INCR', KEYS[4])
redis.call('HSET', KEYS[2], ARGV[1], cmsgpack.pack({ARGV[3], sequence, 0, '', '', 0}))
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[1], sequence, ARGV[1])
if KEYS[6] then redis.call('SET', KEYS[6], ARGV[1], 'PX', ARGV[4]) end
return {ARGV[1], 1}
