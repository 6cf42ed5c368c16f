"""The model card: what a checkpoint is, for whoever finds it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import jinja2
from torch import Tensor

from vlp.config import leaves
from vlp.model import Model
from vlp.parts import parameters_by_part

if TYPE_CHECKING:
    from vlp.checkpoint.load import LoadedConfig
    from vlp.run import RunConfig

_TEMPLATE = """\
---
library_name: vlp
license: {{ licence or "unknown" }}
tags:
- vision-language
---

# Vision-language model, {{ config.fusion.kind }} fusion

Trained with vlp on {{ objectives | join(", ") or "no objective" }}.
{% for part, kind in kinds.items() -%}
{{ part }} `{{ kind }}`, {% endfor -%}
all settings in `config.yaml`.

| part | parameters |
|---|---:|
{% for part, number in parameters.items() -%}
| {{ part }} | {{ "{:,}".format(number) }} |
{% endfor -%}
| all | {{ "{:,}".format(parameters.values() | sum) }} |

## Use

```python
import vlp

model = vlp.load("this folder or its id on the hub")
{% if embeds -%}
vectors = model.embed_images(["image.png"])
{% elif writes -%}
captions = model.caption(["image.png"])
{% else -%}
print(model.report.summary())
{% endif -%}
```

## Data

{% for name, value in data.items() -%}
- {{ name }}: {{ value }}
{% endfor %}
## Results

{% if metrics -%}
| metric | value |
|---|---:|
{% for name, value in metrics -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% else -%}
None were measured when this checkpoint was written.
{% endif %}
## How it was made

```
{{ command or "not recorded" }}
```

{% for name, value in versions.items() -%}
- {{ name }} {{ value }}
{% endfor %}
## Licence

{% if licence -%}
{{ licence }}
{%- else -%}
Not stated. Before you publish the weights, write here and in the first lines what the licences of the data and of the
weights that training began from allow.
{%- endif %}
"""


def model_card(
    run: RunConfig | LoadedConfig,
    metrics: Mapping[str, Any],
    command: str,
    model: Model,
    *,
    data: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> str:
    """Return the Markdown text of a checkpoint's README.

    Args:
        run: the resolved config.
        metrics: results by name; may be nested.
        command: that made the checkpoint.
        model: whose parameters are counted.
        data: what to say of the training data beside the config's name of it: counts, fingerprint.
        licence: of the weights; None leaves a line to fill.
    """
    kinds = {name: getattr(model.config, name) for name in ("vision", "text", "fusion", "decoder")}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE).render(
        config=model.config,
        kinds={name: one.kind for name, one in kinds.items() if one is not None},
        objectives=list(model.objectives),
        parameters=parameters_by_part(model),
        embeds=model.space() is not None,
        writes=model.decoder is not None,
        data={"trained on": run.data.train or "not recorded", **(data or {})},
        metrics=[(_cell(name), _cell(value)) for name, value in leaves(metrics).items()],
        command=command.replace("```", ""),
        versions=_versions(),
        licence=licence,
    )


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in ("vlp", "torch", "timm", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found
