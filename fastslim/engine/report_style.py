"""How a page looks, and the little it does when it is pointed at: no fonts, scripts or images from elsewhere."""

from __future__ import annotations

from fastslim.engine.report_chart import PALETTE


def style() -> str:
    """The style sheet: light or dark as the reader's system is, two columns or one as there is room."""
    light, dark = ("".join(f"--{name}:{pair[theme]};" for name, pair in PALETTE.items()) for theme in (0, 1))
    colors = "".join(
        f".c-{name}{{--c:var(--{name})}}.t-{name}{{fill:color-mix(in srgb,var(--{name}) 80%,var(--ink))}}"
        for name in PALETTE
    )
    themes = f":root{{{light}{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{dark}{DARK}}}}}"
    return f"{themes}{SHEET}{colors}"


LIGHT = (
    "color-scheme:light;--page:#f5f6f8;--card:#fff;--text:#1f2430;--muted:#5b6472;--rule:#e3e6eb;--track:#e8ebf0;"
    "--fill:#0072b2;--tip:#1f2430;--tip-text:#fff;"
)
DARK = (
    "color-scheme:dark;--page:#14171c;--card:#1d2128;--text:#e8eaf0;--muted:#a2abba;--rule:#333a45;--track:#2d333d;"
    "--fill:#56b4e9;--tip:#e8eaf0;--tip-text:#14171c;"
)
SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1160px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:32px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:22px;line-height:1.3;margin:56px 0 4px}
h3{font-size:16px;margin:0}
p{margin:0 0 16px;max-width:72ch}
.muted,figcaption span{color:var(--muted)}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--track);padding:.1em .35em;
border-radius:4px;overflow-wrap:anywhere}
a{color:var(--blue)}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin-top:20px;font-size:15px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:14px;margin:24px 0 0;padding:0}
figcaption,.card,.missing,.legend,header p{overflow-wrap:anywhere}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px}
.card dt{color:var(--muted);font-size:14px}
.card dd{margin:0}
.card .big{font-size:30px;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.card .small{font-size:14px;color:var(--muted)}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px;margin:16px 0}
figure{margin:16px 0;min-width:0}
.pair figure{margin:0}
.pair.start{align-items:start}
figcaption{margin-bottom:10px}
figcaption strong{display:block}
figcaption span{font-size:14px;display:block;line-height:1.4}
figure svg{display:block;width:100%;height:auto}
svg.narrow{display:none}
svg text{font-size:12px;fill:var(--muted);font-family:inherit}
svg text.label{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--rule)}
.base{stroke:var(--muted);stroke-opacity:.6}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 5}
.step{stroke-width:1.5}
.stem{stroke:var(--c);stroke-width:1.5;stroke-opacity:.7}
.dots{fill:none;stroke:var(--c);stroke-width:4;stroke-linecap:round;stroke-opacity:.55}
.marker{fill:var(--c);stroke:var(--card);stroke-width:1.25}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 8px;padding:0;font-size:14px}
.legend li{display:flex;align-items:center;gap:6px}
figure .swatch,.swatch{width:24px;height:14px;flex:none;display:inline-block;vertical-align:middle}
figure.table{padding:0;overflow:hidden}
.table figcaption{padding:16px 18px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
th{white-space:normal;font-weight:600;color:var(--muted);font-size:14px;vertical-align:bottom}
th:first-child,td:first-child,th.words,td.words{text-align:left}
th:first-child,td:first-child{padding-left:18px}
th:last-child,td:last-child{padding-right:18px}
thead th{border-top:0}
tbody tr:hover{background:color-mix(in srgb,var(--track) 45%,transparent)}
td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:12em}
.sortable thead th{cursor:pointer;user-select:none}
.sortable thead th[aria-sort]{color:var(--text)}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
.bars{overflow-x:auto}
.widths{display:grid;grid-template-columns:minmax(150px,230px) repeat(var(--columns),minmax(104px,1fr));gap:3px 14px;
align-items:center;font-size:13px;font-variant-numeric:tabular-nums}
.widths .head{overflow-wrap:anywhere;font-weight:600;align-self:end;padding-bottom:6px;line-height:1.35}
.widths .head span{display:block;font-weight:400;color:var(--muted)}
.widths .unit{display:flex;justify-content:space-between;gap:12px;line-height:1.25}
.widths .unit span:first-child{overflow-wrap:anywhere}
.widths .unit span:last-child{color:var(--muted)}
.bar{position:relative;background:var(--track);border-radius:3px;height:20px;overflow:hidden}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--c);opacity:.38}
.bar b{position:absolute;left:6px;top:0;font-weight:600;line-height:20px}
.missing{background:var(--card);border:1px dashed var(--rule);border-radius:10px;padding:12px 18px;max-width:none;
color:var(--muted);margin:16px 0}
details{margin:16px 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:56px;padding-top:20px;padding-bottom:48px;font-size:14px}
footer dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 24px;margin:8px 0}
footer dt{color:var(--muted)}
footer dd{margin:0;overflow-wrap:anywhere}
#tip{position:absolute;z-index:1;pointer-events:none;background:var(--tip);color:var(--tip-text);padding:6px 10px;
border-radius:6px;font-size:13px;line-height:1.4;max-width:min(340px,90vw);white-space:pre-line}
@media (max-width:900px){.pair{grid-template-columns:minmax(0,1fr)}}
@media (max-width:560px){
main,header,footer{padding-left:14px;padding-right:14px}
header{padding-top:24px}
h1{font-size:25px}
h2{margin-top:40px;font-size:20px}
.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.card{padding:12px}
.card .big{font-size:23px}
figure:not(.table){padding:12px 10px}
figure svg.wide{display:none}
figure svg.narrow{display:block}
th,td,th:first-child,td:first-child{padding:7px 10px}
.table figcaption{padding:12px 10px 0}
.widths{grid-template-columns:repeat(var(--columns),minmax(104px,1fr));gap:2px 8px}
.widths .unit{grid-column:1/-1;padding-top:7px}
.widths .head.unit{display:none}
footer dl{grid-template-columns:minmax(0,1fr);gap:0}
footer dd{margin-bottom:8px}
}
@media print{body{background:#fff}.card,figure{break-inside:avoid}nav{display:none}}
"""

SCRIPT = """
(function(){
var tip=document.createElement('div');tip.id='tip';tip.hidden=true;document.body.appendChild(tip);
document.querySelectorAll('[data-tip]>title').forEach(function(t){t.remove()});
function show(e){
var on=e.target.closest&&e.target.closest('[data-tip]');
tip.hidden=!on;if(!on)return;
tip.textContent=on.getAttribute('data-tip');
var r=on.getBoundingClientRect(),w=document.documentElement.clientWidth;
var x=Math.min(Math.max(8,r.left+r.width/2-tip.offsetWidth/2),w-tip.offsetWidth-8);
var y=r.top-tip.offsetHeight-8;if(y<4)y=r.bottom+8;
tip.style.left=x+scrollX+'px';tip.style.top=y+scrollY+'px';
}
document.addEventListener('pointerover',show);document.addEventListener('pointerdown',show);
document.querySelectorAll('table.sortable').forEach(function(table){
table.querySelectorAll('thead th').forEach(function(head,column){
head.tabIndex=0;
function sort(){
var up=head.getAttribute('aria-sort')==='descending';
table.querySelectorAll('thead th').forEach(function(h){h.removeAttribute('aria-sort')});
head.setAttribute('aria-sort',up?'ascending':'descending');
var body=table.tBodies[0],rows=Array.from(body.rows);
function key(row){var cell=row.cells[column],v=cell.dataset.value;return v===undefined?cell.textContent:parseFloat(v)}
rows.sort(function(a,b){var x=key(a),y=key(b);
if(x!==x)return 1;if(y!==y)return -1;
return (x<y?-1:x>y?1:0)*(up?1:-1)}).forEach(function(row){body.appendChild(row)});
}
head.addEventListener('click',sort);
head.addEventListener('keydown',function(e){if(e.key==='Enter'||e.key===' '){e.preventDefault();sort()}});
});
});
})();
"""
