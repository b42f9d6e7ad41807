"""Generate the operators' schemas again, from pydantic models that follow their CRDs.

Run it in an environment with the two packages that README.md names; the project needs neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cloudcoil.models.keda import v1alpha1  # type: ignore[import-not-found]  # see above
from cloudcoil.models.prometheus_operator import v1  # type: ignore[import-not-found]  # see above

MODELS = (v1alpha1.ScaledObject, v1.PodMonitor, v1.PrometheusRule)
NAMED = ("properties", "$defs")
PROSE = ("description", "title", "default", "examples")


def closed(schema: Any) -> Any:
    """Return the structure alone, in which undefined fields are errors, as in an API server."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: closed(item) for name, item in value.items()} if key in NAMED else closed(value)
        for key, value in schema.items()
        if key not in PROSE
    }
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    if isinstance(pattern := found.get("pattern"), str):  # Python wants flags first
        found["pattern"] = pattern.replace("^(?i)", "(?i)^")
    return _without_null(found)


def _without_null(schema: dict[str, Any]) -> Any:
    """Disallow null: optional fields of pydantic accept it, but an API server does not."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if set(schema) != {"anyOf"}:
        return schema
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def referred(part: Any, definitions: dict[str, Any]) -> set[str]:
    """Return the definitions that `part` refers to, directly or not."""
    names: set[str] = set()
    waiting = [part]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
            name = str(item.get("$ref", "")).rpartition("/")[2]
            if name in definitions and name not in names:
                names.add(name)
                waiting.append(definitions[name])
    return names


def main() -> None:
    """Write one file per kind to the folder of this script."""
    for model in MODELS:
        schema = closed(model.model_json_schema(by_alias=True))
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"].pop("status", None)
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        names = referred(schema["properties"], schema["$defs"])
        schema["$defs"] = {name: schema["$defs"][name] for name in names}
        text = json.dumps(schema, indent=1, sort_keys=True)
        Path(__file__).with_name(f"{model.__name__}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
