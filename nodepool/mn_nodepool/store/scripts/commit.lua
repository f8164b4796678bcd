-- Apply all changes or none.
--   KEYS  the lease, one hash per record kind …, the operation's key (only when it is remembered)
--   ARGV  fence ('' for none), milliseconds to remember the operation (0: no operation),
--         then five per change: index of its hash in KEYS, id, expected version, 'set' or 'del', value
-- Answers {'done', '<version> <version> …'}, {'stale', the lease or ''} or {'mismatch', number of the change, version found}.

if ARGV[1] ~= '' then
  local lease = redis.call('GET', KEYS[1])
  if lease ~= ARGV[1] then return {'stale', lease or ''} end
end

local remembered = ARGV[2] ~= '0' and KEYS[#KEYS]
if remembered then
  local answer = redis.call('GET', remembered)
  if answer then return {'done', answer} end
end

local found = {}
for at = 3, #ARGV, 5 do
  local record = redis.call('HGET', KEYS[tonumber(ARGV[at])], ARGV[at + 1])
  local version = record and tonumber(string.match(record, '^(%d+):')) or 0
  local expected = tonumber(ARGV[at + 2])
  if expected >= 0 and expected ~= version then
    return {'mismatch', (at - 3) / 5, version}
  end
  found[#found + 1] = version
end

local versions = {}
for number, version in ipairs(found) do
  local at = 3 + (number - 1) * 5
  local hash, id = KEYS[tonumber(ARGV[at])], ARGV[at + 1]
  if ARGV[at + 3] == 'del' then
    redis.call('HDEL', hash, id)
    versions[number] = '0'
  else
    versions[number] = string.format('%.0f', version + 1)
    redis.call('HSET', hash, id, versions[number] .. ':' .. ARGV[at + 4])
  end
end

local answer = table.concat(versions, ' ')
if remembered then redis.call('SET', remembered, answer, 'PX', ARGV[2]) end
return {'done', answer}
