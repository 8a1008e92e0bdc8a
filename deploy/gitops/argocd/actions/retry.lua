-- Each new value of the annotation is one retry.
local os = require("os")
if obj.metadata.annotations == nil then
  obj.metadata.annotations = {}
end
obj.metadata.annotations["modelchain.dev/retry"] = os.date("!%Y-%m-%dT%H:%M:%SZ")
return obj
