// 课程网站的四件事：画公式，切换明暗，手机上的目录，搜索。没有它，页面照样能读。
"use strict";
const base = new URL(".", document.currentScript.src);
const $ = (id) => document.getElementById(id);

// 公式：页面里存的是 TeX，由 KaTeX 画。
for (const box of document.querySelectorAll(".math")) {
  const displayMode = box.classList.contains("display");
  katex.render(box.textContent, box, { displayMode, throwOnError: false, strict: "ignore" });
  box.classList.add("drawn");
}

// 太宽的各自横向滚动；能滚动的要能用键盘到达。
function fit() {
  for (const box of document.querySelectorAll(".math:not(.display)")) {
    box.classList.remove("wide");
    const block = box.closest("p, li, td, th, h1, h2, h3, h4, summary, blockquote") || box.parentElement;
    if (box.offsetParent && box.offsetWidth > 200 && box.scrollWidth + box.offsetLeft - block.offsetLeft > block.clientWidth) box.classList.add("wide");
  }
  for (const box of document.querySelectorAll(".scroll, .wide")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
fit();
addEventListener("resize", fit);
addEventListener("load", fit);
document.addEventListener("toggle", fit, true);

// 链接指着折叠里的东西，就把它打开；公式画完，页面长了，再走一次。
function show() {
  const target = $(decodeURIComponent(location.hash.slice(1)));
  const folded = target && (target.closest("details") || (target.id === "solutions" && target.nextElementSibling));
  if (folded) folded.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", show);
show();

// 明暗：记在浏览器里；存不下（隐私模式）也不要紧。
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.theme = root.dataset.theme; } catch { }
});

// 手机上的目录。
function menu(open) {
  document.body.classList.toggle("nav-open", open);
  $("menu").setAttribute("aria-expanded", open);
}
$("menu").addEventListener("click", () => menu(!document.body.classList.contains("nav-open")));
$("nav").addEventListener("click", (event) => event.target.closest("a") && menu(false));

// 搜索：第一次输入时才载入全文（search.js，里面是 find）。
let loading;
const results = $("results");
const query = $("query");
const element = (name, text, attributes = {}) => Object.assign(document.createElement(name), { textContent: text }, attributes);
function load() {
  return loading ||= new Promise((done, failed) => {
    document.head.append(element("script", "", { src: new URL("search.js", base), onload: done, onerror: () => { loading = null; failed(); } }));
  });
}
function highlighted(text, words) {
  const box = element("p", "");
  const any = new RegExp(words.map((word) => pattern(word).source).join("|"), "gi");
  let last = 0;
  for (const found of text.matchAll(any)) {
    box.append(text.slice(last, found.index), element("mark", found[0]));
    last = found.index + found[0].length;
  }
  box.append(text.slice(last));
  return box;
}
async function search() {
  const asked = query.value.trim();
  results.hidden = !asked;
  if (!asked) return;
  try {
    await load();
  } catch {
    results.replaceChildren(element("p", "没有载入搜索用的全文，请检查网络，再试一次。"));
    return;
  }
  if (query.value.trim() !== asked) return; // 又输入了新的
  const { words, found } = find(asked);
  const list = element("ol", "");
  for (const each of found.slice(0, 12)) {
    const item = element("li", "");
    item.append(element("a", each.section || each.title, { href: new URL(each.url, base) }));
    if (each.section) item.append(element("small", each.title));
    item.append(highlighted(each.excerpt, words));
    list.append(item);
  }
  results.replaceChildren(element("p", found.length ? `${found.length} 节里有“${asked}”` : `没有找到“${asked}”，换一个词试试`), list);
}
query.addEventListener("input", search);
$("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { results.hidden = true; menu(false); }
});
document.addEventListener("click", (event) => {
  if (!$("search").contains(event.target)) results.hidden = true;
  else if (event.target === query && query.value.trim()) results.hidden = false;
});
results.addEventListener("click", (event) => event.target.closest("a") && (results.hidden = true));
