-- The actions that Argo CD offers for a ModelChain, as `modelchain suspend`, `resume` and `retry`.
local suspended = obj.spec.suspend == true
local status = obj.status or {}
local complete = false
if tonumber(status.observedGeneration) == tonumber(obj.metadata.generation) then
  for _, condition in ipairs(status.conditions or {}) do
    complete = complete or (condition.type == "Complete" and condition.status == "True")
  end
end

-- Reasons of stalled stages, and of missing metrics, that a retry ends. All others need an edit, or
-- end by themselves.
local helped = {
  NodesAvoided = true,
  IndexFailed = true,
  SuspendedByAnother = true,
  BaselineFailed = true,
  SameDeviceError = true,
  VerifyUnanswered = true,
  MeasureFailed = true,
  MeasureDeadline = true,
  Unmeasured = true,
}
local retry = false
for _, stage in ipairs(status.stages or {}) do
  local measures = stage.reasonCode == "MeasureFailed" or stage.reasonCode == "MeasureDeadline"
  local failed = stage.state == "Failed" or stage.notBefore ~= nil or helped[stage.reasonCode]
  if failed and not measures then
    retry = true
  end
  for _, missing in ipairs(stage.unmeasured or {}) do
    if helped[missing.reasonCode] then
      retry = true
    end
  end
end

return {
  suspend = {
    disabled = suspended or complete,
    iconClass = "fa fa-fw fa-pause",
    displayName = "Suspend at a checkpoint",
  },
  resume = {
    disabled = not suspended,
    iconClass = "fa fa-fw fa-play",
    displayName = "Resume from the newest checkpoint",
  },
  retry = {
    disabled = not retry,
    iconClass = "fa fa-fw fa-redo",
    displayName = "Try again, with budgets renewed",
  },
}
