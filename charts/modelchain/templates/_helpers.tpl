{{- define "modelchain.fullname" -}}
{{- $default := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- .Values.fullnameOverride | default $default | replace "." "-" | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{- define "modelchain.operator" -}}
{{ include "modelchain.fullname" . }}-operator
{{- end -}}

{{- define "modelchain.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "modelchain.operator" .) }}
{{- end -}}

{{- define "modelchain.selector" -}}
app.kubernetes.io/name: modelchain
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "modelchain.labels" -}}
{{- $ours := include "modelchain.selector" . | fromYaml -}}
{{- $_ := set $ours "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $ours "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $ours "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- toYaml (merge $ours .Values.commonLabels) -}}
{{- end -}}

{{- define "modelchain.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- .Values.image.repository }}{{ .Values.image.digest | empty | ternary (printf ":%s" $tag) (printf "@%s" .Values.image.digest) -}}
{{- end -}}

{{/* The operator's configuration file; core/modelchain/plan/pools.py defines its fields. */}}
{{- define "modelchain.config" -}}
{{- $config := pick .Values "namespaces" "progressSeconds" "defaults" -}}
{{- with .Values.nodePools -}}
{{- $_ := set $config "nodePools" . -}}
{{- end -}}
{{- $pools := .Values.nodePools | default (dict "a100-40gb" 0 "a100-80gb" 0 "cpu" 0) -}}
{{- with .Values.defaults.nodePool -}}
{{- if not (hasKey $pools .) -}}
{{- fail (printf "defaults.nodePool: %s is not among nodePools: %s" . (keys $pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Prometheus' pods, as a peer of a network policy. */}}
{{- define "modelchain.prometheus" -}}
{{- $standard := dict "matchLabels" (dict "app.kubernetes.io/name" "prometheus") -}}
{{- with .Values.networkPolicies.prometheus -}}
{{- toYaml (dict "namespaceSelector" .namespaceSelector "podSelector" (.podSelector | default $standard)) -}}
{{- end -}}
{{- end -}}

{{/* Name servers at any address: a node-local DNS cache is not a pod. */}}
{{- define "modelchain.dns" -}}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{/* The currency of all prices of the node pools. The operator refuses a second one. */}}
{{- define "modelchain.currency" -}}
{{- $found := list -}}
{{- range .Values.nodePools -}}
{{- range append (.prices | default list) .price | compact -}}
{{- $found = append $found .currency -}}
{{- end -}}
{{- end -}}
{{- first $found | default "USD" -}}
{{- end -}}
