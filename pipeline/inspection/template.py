"""How the page of `pipeline inspect` looks: its style, and its body as a template of pipeline/pages.py."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6672; --ground: #fff; --panel: #f3f5f7; --rule: #dfe3e8;
  --heat: #e0662f; --k0: #2a6fd0; --k1: #14915f; --k2: #b7791f; --k3: #c0448f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b1; --ground: #15181c; --panel: #1f242a;
  --rule: #343b44; --k0: #6aa5f5; --k1: #3fc08c; --k2: #dba748; --k3: #e07fbb; } }
body { color: var(--ink); background: var(--ground); max-width: 68rem; padding-bottom: 12rem; line-height: 1.5; }
h1 { overflow-wrap: anywhere; } .small, figcaption, .legend, .doc { color: var(--soft); font-size: .9rem; }
.verdict { background: var(--panel); border-left: 4px solid var(--k0); }
.scroll { overflow-x: auto; } table { font-variant-numeric: tabular-nums; } th { border-color: var(--rule); }
.left td, .left th { text-align: left; vertical-align: top; } .left td { overflow-wrap: anywhere; }
.worst td { white-space: pre-wrap; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem 2rem; }
figure { margin: 0; } figcaption { color: var(--ink); font-weight: 600; } .legend { margin: .1rem 0; }
.legend span { margin-right: 1rem; } .legend i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .35rem; border-radius: 2px; vertical-align: -1px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .rule { stroke: var(--rule); }
svg .axis { stroke: var(--soft); } svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dot { stroke: transparent; stroke-width: 12; }
svg .dot:hover { r: 5px; }
.k0 { --mine: var(--k0); } .k1 { --mine: var(--k1); } .k2 { --mine: var(--k2); } .k3 { --mine: var(--k3); }
.k4 { --mine: var(--soft); } .k5 { --mine: var(--rule); }
i, .part { background: var(--mine, var(--k0)); } .line { stroke: var(--mine); } .dot { fill: var(--mine); }
.parts { display: flex; gap: 2px; height: 1.1rem; } .part { border-radius: 2px; min-width: 2px; }
.map { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; background: var(--panel);
  padding: .6rem 1rem; border-radius: 6px; }
.doc { display: block; font: .85rem system-ui, sans-serif; border-top: 1px solid var(--rule); margin-top: .6rem; }
.doc:first-child { border: 0; margin: 0; }
.t { border-radius: 3px; padding: 1px 0; box-decoration-break: clone; } .m { color: var(--soft); opacity: .75; }
.t[tabindex] { cursor: help; } .t[tabindex]:hover, .t:focus { outline: 2px solid var(--ink); }
.h1 { background: color-mix(in srgb, var(--heat) 13%, transparent); }
.h2 { background: color-mix(in srgb, var(--heat) 27%, transparent); }
.h3 { background: color-mix(in srgb, var(--heat) 42%, transparent); }
.h4 { background: color-mix(in srgb, var(--heat) 58%, transparent); }
.h5 { background: color-mix(in srgb, var(--heat) 76%, transparent); }
.card { display: none; position: fixed; z-index: 1; right: 1rem; bottom: 1rem; width: min(26rem, calc(100vw - 4rem));
  padding: .8rem 1rem; background: var(--ground); color: var(--ink); border: 1px solid var(--rule); border-radius: 8px;
  box-shadow: 0 4px 24px #0005; font: 14px/1.5 system-ui, sans-serif; white-space: normal; pointer-events: none; }
.t:hover > .card { display: block; z-index: 2; } .t:focus > .card { display: block; }
.card > span { display: flex; gap: .7rem; } .card .w { flex: 0 1 auto; overflow-wrap: anywhere; white-space: pre-wrap;
  font-family: ui-monospace, monospace; }
.card .small { flex-wrap: wrap; }
.card .b { flex: 0 0 34%; align-self: center; margin-left: auto; }
.card .b i { display: block; height: .55rem; border-radius: 2px; min-width: 1px; }
.card .n { flex: 0 0 3.8rem; text-align: right; font-variant-numeric: tabular-nums; }
.card .own { font-weight: 700; } .card .own .b i { background: var(--heat); }
.scale span { padding: 1px .5rem; border-radius: 3px; margin-right: .25rem; white-space: nowrap; }
"""
BODY = """<h1>{{ name }}</h1><p class=verdict>{{ verdict }}</p>
<table class="left facts">{% for what, text in facts -%}
<tr><td>{{ what }}</td><td>{{ text }}</td></tr>{% endfor %}</table>
{% if parts %}<p><b>Bytes of a target, by part</b></p><div class=parts>{% for part, size in parts -%}
<div class="part k{{ loop.index0 }}" style="flex: {{ size }}"></div>{% endfor %}</div>
<p class=legend>{% for part, size in parts %}<span><i class=k{{ loop.index0 }}></i>{{ part }} {{ '%.1f' % size }}</span>
{%- endfor %}</p>{% endif %}
<h2>Figures</h2><p>Of {{ share }}: {{ counts }}{% if more_temperatures %}; the charts show {{ colours }} of
{{ more_temperatures }} temperatures{% endif %}.</p>
{{ grid(figures) }}
{% if needed %}<h2>How many entries a mass takes</h2>
<p class=small>Half of the positions, and 95 in 100, have the mass with so many of the most probable entries.</p>
<div class=scroll>{{ table(needed) }}</div>{% endif %}
{% for title, rows in worst %}<h2>{{ title }}</h2><div class="scroll left worst">{{ table(rows) }}</div>{% endfor %}
{% if maps %}<h2>Token by token</h2>
<p class=scale>The darker, the less the teacher expected the token, at T = {{ temperature }}: {% for shade in shades %}
<span class="h{{ loop.index0 }}">{{ shade }}</span>{% endfor %} Grey text carries no loss. Point at a token, or tap it,
for what the teacher would have had.</p>{% endif %}
{% for map in maps %}<h3>{{ map.title }}</h3><div class=map>{% for token in map.tokens -%}
{% if token.begins %}<span class=doc>{{ map.documents[token.document] }}</span>{% endif -%}
{% if token.said is none %}<span class="t{% if not token.is_label %} m{% endif %}">{{ show(token.text) }}</span>
{%- else %}<span class="t h{{ shade_of(token.said.label_prob) }}" tabindex=0>{{ show(token.text) or '·' -}}
<span class=card><b class=w>{{ alone(token.text) or '·' }}</b> at {{ token.position }}, id {{ token.index }}:
probability {{ '%.4g' % token.said.label_prob }}{% if token.said.rank %}, number {{ token.said.rank }}{% endif -%}
; entropy {{ '%.3f' % token.said.entropy }} nats
{%- if token.said.alternatives %}, outside the entries {{ '%.3f' % token.said.tail_mass }}{% endif -%}
{%- for index, text, prob in token.said.alternatives -%}
<span{% if index == token.index %} class=own{% endif %}><span class=w>{{ alone(text) }}</span><span class=b>
<i style="width: {{ '%.1f' % (100 * prob) }}%"></i></span><span class=n>{{ '%.4f' % prob }}</span></span>{% endfor -%}
{%- if token.said.draws %}<span class=small>drawn: {% for index, text, count in token.said.draws -%}
<span class=w>{{ alone(text) }}{% if count > 1 %} {{ count }}x{% endif %}</span>{% endfor %}</span>{% endif -%}
</span></span>{% endif %}{% endfor %}{% if map.left %}
<span class=doc>{{ map.left }} more tokens</span>{% endif %}</div>{% endfor %}
"""
