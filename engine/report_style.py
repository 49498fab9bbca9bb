"""The look of the report: one style sheet for a phone, a desktop and paper, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f9f9f7; --box: #ffffff; --ink: #16150f; --muted: #63625c; --grid: #e3e2dc;
  --series-1: #2a78d6; --series-2: #16875f; --series-3: #7a4fd0;
  --true: #16875f; --warn: #fdf3d7; --warn-ink: #5c4400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121211; --box: #1c1c1a; --ink: #f4f3ee; --muted: #a9a79e; --grid: #34332f;
    --series-1: #5b9ff0; --series-2: #35c08e; --series-3: #a98bf0;
    --true: #35c08e; --warn: #3a2f10; --warn-ink: #f3dfa4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 4px 0; }
.note { color: var(--muted); font-size: .9rem; }
.missing { background: var(--warn); color: var(--warn-ink); border-radius: 8px; padding: 8px 12px; margin: 8px 0; }
dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 0 12px; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; }

.cards, .charts, .pairs { display: grid; gap: 16px; margin-top: 12px; }
.cards, .charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
article, figure {
  background: var(--box); border: 1px solid var(--grid); border-radius: 12px;
  padding: 14px 16px; margin: 0; min-width: 0;
}
figcaption { font-weight: 600; margin-bottom: 6px; }

svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.area { fill-opacity: .25; stroke-width: 1.5; }
.s1 { stroke: var(--series-1); }
.s2 { stroke: var(--series-2); }
.s3 { stroke: var(--series-3); }
.area.s1, .dot.s1 { fill: var(--series-1); }
.area.s2, .dot.s2 { fill: var(--series-2); }
.area.s3, .dot.s3 { fill: var(--series-3); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--muted); font-size: .85rem; margin: 6px 0 0; }
.legend b { color: var(--ink); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.k1 { background: var(--series-1); }
.k2 { background: var(--series-2); }
.k3 { background: var(--series-3); }
.matrix {
  display: block; width: 100%; max-width: 340px; aspect-ratio: 1;
  image-rendering: pixelated; border-radius: 4px; margin: 0 auto;
}

.meter { display: grid; grid-template-columns: 3.4em 4.2em 1fr; align-items: baseline; margin: 10px 0; }
.meter { font-variant-numeric: tabular-nums; }
.beside { color: var(--muted); font-size: .8rem; text-align: right; }
.track { grid-column: 1 / -1; position: relative; height: 10px; border-radius: 5px; background: var(--grid); margin-top: 4px; }
.fill { height: 100%; border-radius: 5px; background: var(--series-1); min-width: 2px; }
.mark { position: absolute; top: -3px; height: 16px; width: 2px; margin-left: -1px; background: var(--ink); }
.mark.chance { background: var(--muted); }

.strip { margin-top: 12px; }
.clips {
  display: grid; gap: 10px; margin-top: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr));
}
.clip { border: 2px solid transparent; border-radius: 8px; padding: 4px; min-width: 0; }
.clip.true { border-color: var(--true); }
.clip img { display: block; width: 100%; border-radius: 4px; }
.clip p { font-size: .8rem; overflow-wrap: anywhere; }
.clip em { color: var(--true); font-style: normal; font-weight: 600; white-space: nowrap; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin-top: 8px; }
th { text-align: left; font-weight: 400; color: var(--muted); }
th, td { padding: 4px 20px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
details { margin-top: 24px; }
summary { cursor: pointer; font-weight: 600; }
pre {
  overflow-x: auto; background: var(--box); border: 1px solid var(--grid); border-radius: 12px;
  padding: 14px 16px; font-size: .8rem; line-height: 1.45;
}

@media print {
  :root {
    --page: #fff; --box: #fff; --ink: #000; --muted: #444; --grid: #ccc;
    --series-1: #2a78d6; --series-2: #16875f; --series-3: #7a4fd0;
    --true: #16875f; --warn: #f4f4f4; --warn-ink: #000;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  article, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  .charts, .pairs { grid-template-columns: repeat(2, 1fr); }
  .cards { grid-template-columns: repeat(3, 1fr); }
  .beside { grid-column: 1 / -1; text-align: left; }
  .matrix { max-width: 220px; }
  .clips { grid-template-columns: repeat(6, 1fr); }
  details::details-content { content-visibility: visible; display: block; }
  pre { white-space: pre-wrap; border: 0; padding: 0; columns: 2; }
}
"""
