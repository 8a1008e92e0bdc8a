-- The health of a ModelChain for Argo CD. Its conditions follow kstatus: Stalled and Reconciling
-- exist only while they are true, and never both; Ready is absent while the chain is suspended.
local health = {status = "Progressing", message = "waits for the operator to see it"}
local status = obj.status or {}
local seen = tonumber(status.observedGeneration) or -1
if seen ~= tonumber(obj.metadata.generation) then
  if seen >= 0 then
    health.message = "waits for the operator to see the newest spec"
  end
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  if condition.status == "True" then
    conditions[condition.type] = condition
  end
end
local summary = status.summary or {}

-- What the chain has spent. Only for a chain at rest: each new message is work for Argo CD.
local function with_cost(message)
  if (summary.cost or "") == "" then
    return message
  end
  return message .. "; spent " .. summary.cost .. " " .. (status.currency or "")
end

if conditions.Stalled then
  health = {status = "Degraded", message = with_cost(conditions.Stalled.message)}
elseif conditions.Reconciling then
  local at = "stage " .. (summary.stage or "?")
  if (summary.progress or "") ~= "" then
    at = at .. ", " .. summary.progress
  end
  health.message = at .. "; " .. conditions.Reconciling.message
elseif conditions.Ready then
  health = {status = "Healthy", message = with_cost(conditions.Ready.message)}
elseif conditions.Suspended then
  health = {status = "Suspended", message = with_cost(conditions.Suspended.message)}
end
return health
