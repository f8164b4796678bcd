#!lua flags=allow-oom
-- Lease the oldest invocation of a queue that is waiting or whose lease ended. What is queued must drain when memory is short, hence allow-oom.
-- A state is {queue, sequence, attempt, token, holder, end of the lease in ms}; it is the truth, the two sorted sets are indexes of it.
--   KEYS  waiting (by sequence), leased (by end of the lease), states, values
--   ARGV  now in ms, end of the new lease in ms, its token, its holder, how many ended leases to look at
-- Answers {id, value, attempt} or nothing.

local now = tonumber(ARGV[1])

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[5])) do
  redis.call('ZREM', KEYS[2], id)
  local packed = redis.call('HGET', KEYS[3], id)
  if packed then redis.call('ZADD', KEYS[1], cmsgpack.unpack(packed)[2], id) end
end

while true do
  local id = redis.call('ZPOPMIN', KEYS[1])[1]
  if not id then return false end
  local packed = redis.call('HGET', KEYS[3], id)
  if packed then
    local state = cmsgpack.unpack(packed)
    if state[6] > now then
      redis.call('ZADD', KEYS[2], state[6], id)
    else
      local attempt = state[3] + 1
      redis.call('HSET', KEYS[3], id, cmsgpack.pack({state[1], state[2], attempt, ARGV[3], ARGV[4], tonumber(ARGV[2])}))
      redis.call('ZADD', KEYS[2], ARGV[2], id)
      return {id, redis.call('HGET', KEYS[4], id), attempt}
    end
  end
end
