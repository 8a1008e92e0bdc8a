{{/* The operator's rights in the namespaces it serves. operator/rbac is rendered from here too. */}}
{{- define "modelchain.rules" -}}
# Chains: users write the spec, the operator only the status.
- apiGroups: [modelchain.dev]
  resources: [modelchains]
  verbs: [get, list, watch]
- apiGroups: [modelchain.dev]
  resources: [modelchains/status]
  verbs: [update]
# Records of finished stages: created once, never changed or deleted. Metrics that are measured
# later are added to their status.
- apiGroups: [modelchain.dev]
  resources: [stageartifacts]
  verbs: [get, list, watch, create]
- apiGroups: [modelchain.dev]
  resources: [stageartifacts/status]
  verbs: [patch]
# Attempts: created suspended, released by a patch, deleted to stop them.
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
# Verify, index and evaluation Jobs: one that fails is deleted and created again, and one that is not
# needed any more is deleted.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# The claim of artifacts: created, never deleted or resized. Listed to see when one is gone.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, create]
# Shares: which chain may train a stage that several chains share.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, list, create, delete]
# Whether Kueue has a default queue. Jobs without a queue go into it, so that its quota applies.
- apiGroups: [kueue.x-k8s.io]
  resources: [localqueues]
  resourceNames: [default]
  verbs: [get]
# Written about chains; read to learn why pods are refused.
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
{{- end -}}

{{/* roleRef and subjects of a binding: (list $ "Role" "its name"). */}}
{{- define "modelchain.binding" -}}
{{- $ := index . 0 -}}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ index . 1 }}
  name: {{ index . 2 }}
subjects:
  - kind: ServiceAccount
    name: {{ include "modelchain.serviceAccount" $ }}
    namespace: {{ $.Release.Namespace }}
{{- end -}}
