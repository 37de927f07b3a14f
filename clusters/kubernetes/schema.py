"""Makes schema.json: the part of the KubeRay operator's schema that our manifests touch.

The operator publishes it as two files of a megabyte each. Of every object in our manifests, the
part kept has all permitted fields, with type, permitted values and what is required; of fields
that we do not use, no more than that. After a change to a manifest, or for another version of the
operator, with ray.io_rayclusters.yaml and ray.io_rayservices.yaml of its repository's
ray-operator/config/crd/bases in FOLDER:

    python clusters/kubernetes/schema.py FOLDER VERSION
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayService": "ray.io_rayservices.yaml"}


def manifests() -> dict[str, Any]:
    """Our objects of the operator's, by kind."""
    texts = [(HERE / f"{kind.lower()}.yaml").read_text() for kind in KINDS]
    found = [document for text in texts for document in yaml.safe_load_all(text)]
    return {document["kind"]: document for document in found if document["kind"] in KINDS}


def published(folder: Path, kind: str) -> dict[str, Any]:
    """The whole schema of a kind, as the operator publishes it."""
    text = (folder / KINDS[kind]).read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def reduced(schema: dict[str, Any], found: list[Any] | None) -> dict[str, Any]:
    """As JSON Schema, closed to unknown fields, what of `schema` the values `found` visit.

    With None, all of it.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: schema[key] for key in ("type", "enum", "minimum") if key in schema}
    if found == []:
        return kept
    if "required" in schema:
        kept["required"] = schema["required"]
    if "items" in schema:
        kept["items"] = reduced(schema["items"], found and [x for value in found for x in value])
    if "properties" in schema:
        kept["additionalProperties"] = False
        kept["properties"] = {
            name: reduced(part, found and [value[name] for value in found if name in value])
            for name, part in sorted(schema["properties"].items())
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = found and [x for value in found for x in value.values()]
        kept["additionalProperties"] = reduced(schema["additionalProperties"], inner)
    return kept


def make(folder: Path, version: str) -> dict[str, Any]:
    """What schema.json holds."""
    return {
        "operator": f"KubeRay {version}",
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in KINDS.values()
        },
        "kinds": {
            kind: reduced(published(folder, kind), [document])
            for kind, document in manifests().items()
        },
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    made = make(Path(sys.argv[1]), sys.argv[2])
    (HERE / "schema.json").write_text(json.dumps(made, indent=1) + "\n")
