<<<<<<< HEAD
{{/* The operator's rights in the namespaces it serves. operator/rbac is rendered from here too. */}}
{{- define "modelchain.rules" -}}
# Chains: users write the spec, the operator only the status.
=======
{{/* The operator's rights in the namespaces that it serves. operator/rbac is rendered from here. */}}
{{- define "modelchain.rules" -}}
# Chains: the operator writes only their status.
>>>>>>> misc
- apiGroups: [modelchain.dev]
  resources: [modelchains]
  verbs: [get, list, watch]
- apiGroups: [modelchain.dev]
  resources: [modelchains/status]
  verbs: [update]
<<<<<<< HEAD
# Records of finished stages: created once, never changed or deleted.
=======
# Records of finished stages: created, never changed or deleted.
>>>>>>> misc
- apiGroups: [modelchain.dev]
  resources: [stageartifacts]
  verbs: [get, list, watch, create]
# Attempts: created suspended, released by a patch, deleted to stop them.
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
# Verify Jobs: one that ends without an answer is deleted and created again.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# The claim of artifacts: created, never deleted or resized.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
<<<<<<< HEAD
# Shares: which chain may train a stage that several chains share.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, list, create, delete]
# Whether Kueue has a default queue. Jobs without a queue go into it, so that its quota applies.
=======
# Leases for stages that several chains share: one chain trains at a time.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, list, create, delete]
# Whether Kueue has a LocalQueue named default. If so, jobs that name no queue go there, so that its quota holds.
>>>>>>> misc
- apiGroups: [kueue.x-k8s.io]
  resources: [localqueues]
  resourceNames: [default]
  verbs: [get]
<<<<<<< HEAD
# Written about chains; read to learn why pods are refused.
=======
# Events: created for chains, and read to learn why pods are refused.
>>>>>>> misc
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
