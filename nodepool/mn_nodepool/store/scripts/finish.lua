#!lua flags=allow-oom
-- Commit the one outcome of an invocation. It frees memory, hence allow-oom.
--   KEYS  waiting, leased, states, values, the id's outcome
--   ARGV  id, token of the attempt, outcome, milliseconds to keep it
-- Answers 1, or 0 when the token is not the current one or the invocation is finished.

local packed = redis.call('HGET', KEYS[3], ARGV[1])
if not packed or ARGV[2] == '' or cmsgpack.unpack(packed)[4] ~= ARGV[2] then return 0 end

redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('SET', KEYS[5], ARGV[3], 'PX', ARGV[4])
return 1
