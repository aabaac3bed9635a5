"""The whole document is Cog's: its components, its paths, its references and its outputs."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cog
import pytest
from cog import _inspector

from test_folder.schema.project import components, schema, write_project, write_training


def test_training_has_its_own_components_and_paths(tmp_path: Path) -> None:
    model = "class Result(BaseModel):\n    weights: Path\n    loss_curve: Optional[str]\n    note: str = ''\n\n"
    train = 'def train(images: Path = Input(description="d")) -> Result:\n    return None\n'
    root = write_training(write_project(tmp_path, output="list[Path]"), model + train)
    document = schema.schema_of(root)
    assert list(document["paths"]) == [
        "/",
        "/health-check",
        "/predictions",
        "/predictions/{prediction_id}/cancel",
        "/trainings",
        "/trainings/{training_id}/cancel",
    ]
    schemas = document["components"]["schemas"]
    assert schemas["TrainingInput"]["required"] == ["images"]
    assert schemas["TrainingOutput"] == {
        "title": "Output",
        "type": "object",
        "properties": {
            "weights": {"title": "Weights", "type": "string", "format": "uri"},
            "loss_curve": {"title": "Loss Curve", "type": "string", "nullable": True},
            "note": {"title": "Note", "type": "string"},
        },
        "required": ["weights"],
    }
    assert schemas["TrainingRequest"]["properties"]["input"] == {"$ref": "#/components/schemas/TrainingInput"}
    assert schemas["TrainingResponse"]["properties"]["output"] == {"$ref": "#/components/schemas/TrainingOutput"}


def test_every_reference_in_the_document_resolves(tmp_path: Path) -> None:
    line = 'base: str = Input(description="d", choices=["a", "b"])'
    root = write_training(write_project(tmp_path, line), f"def train({line}) -> Path: ...\n")
    document = schema.schema_of(root)

    def references(value: Any) -> Iterator[str]:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        yield from (value["$ref"],) if isinstance(value, dict) and "$ref" in value else ()
        for child in children:
            yield from references(child)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) == known - {"#/components/schemas/Status"}


def test_document_has_the_fixed_components_of_cog(tmp_path: Path) -> None:
    date = {"type": "string", "format": "date-time"}
    assert components(write_project(tmp_path)) == {
        "Input": {"title": "Input", "type": "object", "properties": {}},
        "Output": {"title": "Output", "type": "string"},
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {"id": {"title": "Id", "type": "string"}, "input": {"$ref": "#/components/schemas/Input"}},
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": {
                "input": {"$ref": "#/components/schemas/Input"},
                "output": {"$ref": "#/components/schemas/Output"},
                "id": {"title": "Id", "type": "string"},
                "version": {"title": "Version", "type": "string"},
                "created_at": {"title": "Created At"} | date,
                "started_at": {"title": "Started At"} | date,
                "completed_at": {"title": "Completed At"} | date,
                "status": {"title": "Status", "type": "string"},
                "error": {"title": "Error", "type": "string"},
                "logs": {"title": "Logs", "type": "string"},
                "metrics": {"title": "Metrics", "type": "object"},
            },
        },
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {
                "detail": {
                    "title": "Detail",
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/ValidationError"},
                }
            },
        },
        "ValidationError": {
            "title": "ValidationError",
            "required": ["loc", "msg", "type"],
            "type": "object",
            "properties": {
                "loc": {
                    "title": "Location",
                    "type": "array",
                    "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                },
                "msg": {"title": "Message", "type": "string"},
                "type": {"title": "Error Type", "type": "string"},
            },
        },
    }


def test_prediction_endpoints_are_those_of_cog(tmp_path: Path) -> None:
    def answer(description: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": content}}}

    invalid = answer("Validation Error", {"$ref": "#/components/schemas/HTTPValidationError"})
    paths = schema.schema_of(write_project(tmp_path))["paths"]
    assert paths["/predictions"]["post"] == {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}
        },
        "responses": {
            "200": answer("Successful Response", {"$ref": "#/components/schemas/PredictionResponse"}),
            "422": invalid,
        },
    }
    assert paths["/predictions/{prediction_id}/cancel"]["post"] == {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [
            {
                "required": True,
                "schema": {"title": "Prediction Id", "type": "string"},
                "name": "prediction_id",
                "in": "path",
            }
        ],
        "responses": {"200": answer("Successful Response", {}), "422": invalid},
    }
    assert paths["/health-check"]["get"] == {
        "summary": "Healthcheck",
        "operationId": "healthcheck_health_check_get",
        "responses": {"200": answer("Successful Response", {})},
    }


def test_document_names_the_cog_that_is_installed(tmp_path: Path) -> None:
    info = schema.schema_of(write_project(tmp_path))["info"]
    assert info == {"title": "Cog", "version": importlib.metadata.version("cog")}


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [("str", str), ("Path", cog.Path), ("list[Path]", list[cog.Path]), ('"Iterator[Path]"', Iterator[cog.Path])],
)
def test_output_type_has_the_shape_that_cogs_own_inspector_gives(tmp_path: Path, annotation: str, kind: Any) -> None:
    output = components(write_project(tmp_path, output=annotation))["Output"]
    assert output == _inspector._create_output_type(kind).json_type()
