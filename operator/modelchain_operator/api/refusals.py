"""Which command to type when the API server refuses an object.

The server gives the cause only in the sentence of its answer, so that is searched.
"""

from __future__ import annotations


def next_command(message: str, namespace: str) -> str:
    """The command that shows the quota, policy or limit; empty if the message names none."""
    if "exceeded quota" in message:
        return f"kubectl describe resourcequota -n {namespace}"
    if "PodSecurity" in message:
        return f"kubectl get namespace {namespace} --show-labels"
    if "failed calling webhook" in message:
        return "kubectl get mutatingwebhookconfigurations,validatingwebhookconfigurations"
    if "maximum" in message or "minimum" in message:
        return f"kubectl describe limitrange -n {namespace}"
    return ""
