// Command verdicts says what GitOps tools make of objects: kstatus, Argo CD and Flux, each by its
// own code. It reads a Question as JSON from its input and writes the answers, by name, as JSON.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"

	"github.com/argoproj/argo-cd/gitops-engine/pkg/diff"
	"github.com/argoproj/argo-cd/gitops-engine/pkg/health"
	appv1 "github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/notifications-engine/pkg/triggers"
	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Question has the objects by name and, of some, the manifests in Git; Argo CD's two customizations
// as argocd-cm holds them; and Flux's health checks by the name of the profile.
type Question struct {
	Health  string                                      `json:"health"`
	Actions string                                      `json:"actions"`
	Flux    map[string]kustomize.HealthCheckExpressions `json:"flux"`
	Objects map[string]json.RawMessage                  `json:"objects"`
	Git     map[string]json.RawMessage                  `json:"git"`
	Notices Notices                                     `json:"notices"`
}

// Notices has Argo CD's triggers and the text of its template, and Applications by name.
type Notices struct {
	Triggers map[string][]triggers.Condition `json:"triggers"`
	Template string                          `json:"template"`
	Apps     map[string]map[string]any       `json:"apps"`
}

// Answers has the answers about objects by name, and about each Application the text that each
// trigger sends; none where it does not fire.
type Answers struct {
	Objects map[string]Answer            `json:"objects"`
	Notices map[string]map[string]string `json:"notices"`
}

// Answer is about one object. Differs: Argo CD takes the object for another one than its manifest,
// so that a self-heal applies the manifest. Offered has each action that Argo CD shows, and the
// object after it; null for one that is disabled.
type Answer struct {
	Kstatus string            `json:"kstatus"`
	Health  string            `json:"health"`
	Message string            `json:"message"`
	Flux    map[string]string `json:"flux"`
	Differs bool              `json:"differs"`
	Offered map[string]any    `json:"offered"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var question Question
	if err := json.NewDecoder(os.Stdin).Decode(&question); err != nil {
		return err
	}
	answers := map[string]Answer{}
	for name, text := range question.Objects {
		answer, err := question.answer(text, question.Git[name])
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		answers[name] = answer
	}
	notices, err := question.Notices.sent()
	if err != nil {
		return fmt.Errorf("argo notifications: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(Answers{answers, notices})
}

func (notices Notices) sent() (map[string]map[string]string, error) {
	engine, err := triggers.NewService(notices.Triggers)
	if err != nil {
		return nil, err
	}
	text, err := template.New("notice").Parse(notices.Template)
	if err != nil {
		return nil, err
	}
	sent := map[string]map[string]string{}
	for name, app := range notices.Apps {
		sent[name] = map[string]string{}
		vars := map[string]any{"app": app}
		for trigger := range notices.Triggers {
			found, err := engine.Run(trigger, vars)
			if err != nil {
				return nil, err
			}
			for _, condition := range found {
				if !condition.Triggered {
					continue
				}
				var said strings.Builder
				if err := text.Execute(&said, vars); err != nil {
					return nil, err
				}
				sent[name][trigger] = said.String()
			}
		}
	}
	return sent, nil
}

func (question Question) answer(text, git json.RawMessage) (answer Answer, err error) {
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(text); err != nil {
		return answer, err
	}
	if answer, err = question.about(object); err != nil || git == nil {
		return answer, err
	}
	manifest := &unstructured.Unstructured{}
	if err := manifest.UnmarshalJSON(git); err != nil {
		return answer, err
	}
	result, err := diff.Diff(manifest, object)
	if err != nil {
		return answer, fmt.Errorf("argo diff: %w", err)
	}
	answer.Differs = result.Modified
	return answer, nil
}

func (question Question) about(object *unstructured.Unstructured) (answer Answer, err error) {
	result, err := status.Compute(object)
	if err != nil {
		return answer, fmt.Errorf("kstatus: %w", err)
	}
	answer.Kstatus = string(result.Status)
	if answer.Flux, err = question.flux(object); err != nil {
		return answer, fmt.Errorf("flux: %w", err)
	}
	overrides := lua.ResourceHealthOverrides{
		"modelchain.dev/ModelChain": {HealthLua: question.Health, Actions: question.Actions},
	}
	found, err := health.GetResourceHealth(object, overrides)
	if err != nil {
		return answer, fmt.Errorf("argo health: %w", err)
	}
	answer.Health, answer.Message = string(found.Status), found.Message
	if answer.Offered, err = offered(object, lua.VM{ResourceOverrides: overrides}); err != nil {
		return answer, fmt.Errorf("argo actions: %w", err)
	}
	return answer, nil
}

func (question Question) flux(object *unstructured.Unstructured) (map[string]string, error) {
	verdicts := map[string]string{}
	for profile, expressions := range question.Flux {
		evaluator, err := cel.NewStatusEvaluator(&expressions)
		if err != nil {
			return nil, err
		}
		result, err := evaluator.Evaluate(context.Background(), object)
		if err != nil {
			return nil, err
		}
		verdicts[profile] = string(result.Status)
	}
	return verdicts, nil
}

func offered(object *unstructured.Unstructured, vm lua.VM) (map[string]any, error) {
	scripts, err := vm.GetResourceActionDiscovery(object)
	if err != nil {
		return nil, err
	}
	actions, err := vm.ExecuteResourceActionDiscovery(object, scripts)
	if err != nil {
		return nil, err
	}
	after := map[string]any{}
	for _, action := range actions {
		after[action.Name] = nil
		if action.Disabled {
			continue
		}
		if after[action.Name], err = applied(object, vm, action); err != nil {
			return nil, fmt.Errorf("%s: %w", action.Name, err)
		}
	}
	return after, nil
}

func applied(
	object *unstructured.Unstructured, vm lua.VM, action appv1.ResourceAction,
) (any, error) {
	script, err := vm.GetResourceAction(object, action.Name)
	if err != nil {
		return nil, err
	}
	impacted, err := vm.ExecuteResourceAction(object, script.ActionLua, nil)
	if err != nil {
		return nil, err
	}
	if len(impacted) != 1 || impacted[0].K8SOperation != lua.PatchOperation {
		return nil, fmt.Errorf("it changes %d objects, and not this one alone", len(impacted))
	}
	return impacted[0].UnstructuredObj.Object, nil
}
