"""The page of a report: its template, filled so that no text of a data set can be anything but text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

# Pictures are part of the page: nothing is fetched, and nothing on it can run.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Causal tracing of {{ title }}</title>
<style>
:root { --ink: #1c1c1c; --soft: #666; --line: #ddd; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 600; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line);
  font-weight: 600; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 42rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
.warning { color: #8c2d04; }
table { border-collapse: collapse; margin: .8rem 0 1.2rem;
  font: 13px/1.45 system-ui, "Segoe UI", sans-serif; }
caption { text-align: left; padding-bottom: .3rem; font-family: inherit; }
th, td { text-align: left; vertical-align: top; padding: .22rem 1.2rem .22rem 0;
  border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom-color: #bbb; white-space: nowrap; }
tbody th { font-weight: 400; color: var(--soft); border-bottom-color: #eee; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1.2rem; }
.sample { padding: .8rem; border: 1px solid var(--line); border-radius: 6px; }
.about { display: flex; gap: 1rem; margin-bottom: .6rem; }
.about > div { flex: 1 1 0; min-width: 0; }
.about > .picture { flex: 0 0 7.5rem; }
.picture img, .missing { width: 100%; height: auto; border-radius: 3px; display: block; }
.missing { height: 6rem; background: #f2f2f2; color: var(--soft); font: 12px/1.3 system-ui, sans-serif;
  display: flex; align-items: center; justify-content: center; text-align: center; padding: .5rem; }
.sample p { margin: 0; font-size: .92rem; overflow-wrap: anywhere; }
.sample .map img { max-width: 100%; height: auto; }
@media (max-width: 32rem) { .samples { grid-template-columns: 1fr; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  .samples { grid-template-columns: 1fr 1fr; }
  .about > .picture { flex-basis: 5rem; }
  figure, .sample, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
</style>
</head>
<body>
{% macro picture(one, alt) %}
<img src="data:image/png;base64,{{ one.data }}" width="{{ one.width }}" alt="{{ alt }}">
{%- endmacro %}
{% macro share(part, whole) %}{{ "%.1f %%" % (100 * part / whole) if whole else "–" }}{% endmacro %}

<h1>Causal tracing of {{ title }}</h1>
<p class="soft">Run {{ run_id }}, {{ "complete" if complete else "not complete" }}:
{{ "{:,}".format(overview.total.samples) }} of {{ "{:,}".format(planned) }} samples done, made by blip_trace
{{ version }}.</p>
{% if not complete %}<p class="warning">The run is not complete: numbers will change.</p>{% endif %}

<h2>What was run</h2>
<table>
<caption>Samples</caption>
<thead><tr><th>status</th><th class="number">samples</th><th class="number">share</th></tr></thead>
<tbody>
{% for status, count in overview.counts.items() %}
<tr><th>{{ meanings[status] }}</th><td class="number">{{ "{:,}".format(count) }}</td>
<td class="number">{{ share(count, overview.total.samples) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if overview.total.known %}
<p>The model answers {{ share(overview.total.right, overview.total.known) }} right
({{ "{:,}".format(overview.total.right) }} of {{ "{:,}".format(overview.total.known) }} samples whose right
answer is known, those left out among them).</p>
{% else %}
<p>Of no sample is it known whether the model answers it right.</p>
{% endif %}
{% if overview.types is none %}
<p>There are too many types of questions to tell them apart.</p>
{% elif types %}
<table>
<caption>Types of questions{% if hidden_types %}, the {{ types | length }} largest; {{ hidden_types }} more
are not shown{% endif %}. Scores: mean {{ metric }} of those traced.</caption>
<thead><tr><th>type</th><th class="number">samples</th><th class="number">traced</th>
<th class="number">right</th><th class="number">clean</th><th class="number">corrupted</th>
<th class="number">total effect vanishes</th></tr></thead>
<tbody>
{% for name, one in types %}
<tr><td>{{ name }}</td><td class="number">{{ "{:,}".format(one.samples) }}</td>
<td class="number">{{ "{:,}".format(one.traced) }}</td>
<td class="number">{{ share(one.right, one.known) }}</td>
<td class="number">{{ "%.3f" % (one.high / one.traced) if one.traced else "–" }}</td>
<td class="number">{{ "%.3f" % (one.low / one.traced) if one.traced else "–" }}</td>
<td class="number">{{ share(one.vanishing, one.traced) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
<table>
<caption>Settings</caption>
<tbody>
{% for name, value in settings %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>

<h2>Where the answer is carried</h2>
{% if not maps %}
<p class="warning">No sample was traced, so there is nothing to average.</p>
{% else %}
<p>Each cell is the mean over samples of the {{ effect }}: how much of it comes
{{ "back when one state of the corrupted run is restored to its clean value" if not noising else
"off when one state of the clean run is replaced by its corrupted value" }}. A sample counts with the mean
over its tokens of a role. Intervals are {{ "%g" % (100 * level) }} % bootstrap intervals over images, so
questions that share an image are not taken for independent.</p>
{% if not spread %}<p class="soft">Each map is of a single sample of the corruption: how far one sample's map
can be trusted is unknown, its averages' intervals hold all the same.</p>{% endif %}
<table>
<caption>The largest average effect of each map</caption>
<thead><tr><th>map</th><th>role</th><th>layer</th><th class="number">effect</th>
<th class="number">interval</th><th class="number">samples</th><th>not counted</th></tr></thead>
<tbody>
{% for one in maps %}
<tr><td>{{ one.name }}</td>
{% if one.peak %}<td>{{ one.peak.role }}</td><td>{{ one.peak.layer }}</td>
<td class="number">{{ one.peak.mean }}</td><td class="number">{{ one.peak.interval }}</td>
<td class="number">{{ one.peak.n }}</td>
{% else %}<td colspan="5">no sample has this map with finite numbers</td>{% endif %}
<td>{{ one.excluded or "–" }}</td></tr>
{% endfor %}
</tbody>
</table>
{% for one in maps if one.figure %}
<figure><h3>{{ one.name }}</h3>
{{ picture(one.figure, "Heatmaps of " ~ one.name) }}
<figcaption>{{ one.caption }}</figcaption></figure>
{% endfor %}
{% for name, figure in curves %}
<figure><h3>{{ name }}, layer by layer</h3>
{{ picture(figure, "Curves over the layers of the " ~ name) }}
<figcaption>Lines are means over all samples, bands their {{ "%g" % (100 * level) }} % intervals.</figcaption>
</figure>
{% endfor %}

<h2>Samples that stand out</h2>
<p>By their map of {{ leading }}. Colours of every map run from no effect to its own largest.</p>
{% for heading, about, samples in extremes %}
<h3>{{ heading }}</h3>
<p class="soft">{{ about }}</p>
<div class="samples">
{% for one in samples %}
<div class="sample">
<div class="about">
<div class="picture">{% if one.thumbnail %}{{ picture(one.thumbnail, "image of the sample") }}{% else %}
<div class="missing">image not available</div>{% endif %}</div>
<div>
<p><strong>{{ one.row.question }}</strong> → {{ one.row.answer }}</p>
{% if one.row.correct is false %}
<p class="warning">The model says {{ one.row.model_answer }}{% if one.row.answers %}, right is
{{ one.row.answers | join(" or ") }}{% endif %}.</p>
{% endif %}
<p class="soft">{{ one.row.sample_id }}{% if one.row.type %} · {{ one.row.type }}{% endif %}<br>
{{ one.about }} · clean {{ "%.3g" % one.high }}, corrupted {{ "%.3g" % one.low }}</p>
{% if one.row.total_effect_vanishes %}
<p class="warning">Its total effect vanishes: the map shows nothing.</p>
{% endif %}
</div>
</div>
<div class="map">{{ picture(one.figure, "effects of every token and layer") }}</div>
</div>
{% endfor %}
</div>
{% endfor %}
{% endif %}

<h2>What could not be traced</h2>
{% if overview.failures %}
<table>
<thead><tr><th>reason</th><th class="number">samples</th><th>such as</th></tr></thead>
<tbody>
{% for reason, failure in failures %}
<tr><td>{{ reason }}</td><td class="number">{{ "{:,}".format(failure.samples) }}</td>
<td>{{ failure.examples | join(", ") }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if hidden_failures %}<p class="soft">{{ hidden_failures }} rarer reasons are not shown.</p>{% endif %}
{% else %}
<p>Every sample could be traced{{ " or was left out" if overview.counts.filtered else "" }}.</p>
{% endif %}
{% if overview.counts.filtered %}
<p>{{ "{:,}".format(overview.counts.filtered) }} samples were left out, for the model answers them
wrongly.</p>
{% endif %}
</body>
</html>
"""


def render(values: Mapping[str, Any]) -> str:
    """The page. All texts are escaped and lose their control characters, whoever wrote them."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_plain, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_PAGE).render(values)


def _plain(value: Any) -> Any:
    from ...plotting import printable

    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
