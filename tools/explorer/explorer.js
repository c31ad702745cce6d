// 页面：旋钮、画布、按钮。画脸在 faces.js，网络在 network.js，数由 manifest.json 来。
"use strict";

const $ = (selector) => document.querySelector(selector);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const BIG = 3; // 学到的旋钮转到 ±3

// ---------------------------------------------------------------- 取文件

const waiting = {}; // 名字 → 收到之后做什么，只在 file:// 上用
/** 双击打开的网页不能 fetch；同样的内容另有一份 名字.js，它调用这个函数。 */
function received(name, text) {
  waiting[name](Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

/** 取一个文件：Promise<ArrayBuffer>。 */
function take(name) {
  if (location.protocol !== "file:") {
    return fetch(name).then((reply) => (reply.ok ? reply.arrayBuffer() : Promise.reject(new Error(`${name}：${reply.status}`))));
  }
  return new Promise((resolve, reject) => {
    waiting[name] = resolve;
    const script = document.createElement("script");
    script.src = `${name}.js`;
    script.onerror = () => reject(new Error(`没有 ${name}.js`));
    document.head.append(script);
  });
}

function picture(name) {
  const image = new Image();
  image.src = name;
  return image.decode().then(() => image);
}

// ---------------------------------------------------------------- 画布

/** [3, n, n] 的 uint8 画到画布上。 */
function show(canvas, pixels) {
  const area = pixels.length / 3, context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < area; i++) {
    for (let k = 0; k < 3; k++) image.data[4 * i + k] = pixels[k * area + i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** 拼图里的第 index 格画到画布上；一行 columns 格。 */
function showFrame(canvas, sheet, index, columns) {
  const n = canvas.width;
  canvas.getContext("2d").drawImage(sheet, (index % columns) * n, Math.floor(index / columns) * n, n, n, 0, 0, n, n);
}

// ---------------------------------------------------------------- 旋钮

/** 一个旋钮：role=slider，横着拖、方向键、Home、End、Page Up、Page Down、双击；转动时调用 turned(value)。 */
class Dial {
  constructor({ label, detail = "", low, high, rest, step, title, unused = false }, turned) {
    Object.assign(this, { low, high, rest, step, turned });
    this.element = document.createElement("div");
    this.element.className = unused ? "dial unused" : "dial";
    this.element.innerHTML = '<div class="face" tabindex="0" role="slider"></div><span class="label"></span><span class="detail"></span>';
    this.face = this.element.firstChild;
    this.element.querySelector(".label").textContent = label;
    this.element.querySelector(".detail").textContent = detail;
    for (const [name, value] of Object.entries({ label: title, valuemin: low, valuemax: high })) this.face.setAttribute(`aria-${name}`, value);
    this.face.title = title;
    this.face.addEventListener("keydown", (event) => this.key(event));
    this.face.addEventListener("pointerdown", (event) => this.grab(event));
    this.face.addEventListener("pointermove", (event) => this.drag(event));
    this.face.addEventListener("dblclick", () => this.turn(this.rest));
  }

  /** 只摆到 value，不通知；moved 在 0 与 1 之间，是它跟着动了多少，画成一圈晕。 */
  set(value, moved = 0) {
    value = clip(value, this.low, this.high);
    if (value === this.value && moved === this.moved) return; // 没有变的不碰，省去重画
    Object.assign(this, { value, moved });
    const angle = (v) => -135 + (270 * (v - this.low)) / (this.high - this.low); // 转满是 270 度，正上方是中点
    const [a, b] = [angle(this.rest), angle(this.value)].sort((x, y) => x - y);
    this.face.style.cssText = `--turn: ${angle(this.value)}deg; --from: ${a}deg; --span: ${b - a}deg; --moved: ${moved.toFixed(2)}`;
    this.face.setAttribute("aria-valuenow", this.value.toFixed(2));
    this.face.setAttribute("aria-valuetext", this.value.toFixed(2).replace("-", "负 "));
  }

  turn(value) {
    this.set(value);
    this.turned(this.value);
  }

  key(event) {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[event.key];
    const ends = { Home: this.low, End: this.high }[event.key];
    if (steps === undefined && ends === undefined) return;
    event.preventDefault();
    this.turn(ends ?? this.value + steps * this.step);
  }

  grab(event) {
    this.held = { x: event.clientX, y: event.clientY, value: this.value };
    this.face.setPointerCapture(event.pointerId);
    begin();
  }

  drag(event) {
    if (!this.face.hasPointerCapture(event.pointerId)) return;
    const up = event.pointerType === "mouse" ? this.held.y - event.clientY : 0; // 手指上下是滚动页面
    this.turn(this.held.value + ((event.clientX - this.held.x + up) / 160) * (this.high - this.low));
  }
}

// ---------------------------------------------------------------- 开场

let manifest, frames, samples, network, dials;
let factors, z; // 现在的十二个因子、十六个隐变量
let before; // 这一次动手之前的 z，用来看哪些旋钮跟着动了
let last = null; // 最近转的是什么：学到的第几个旋钮，或 "factors"；什么也没动是 null

const DECODER = "weights.bin", ENCODER = "encoder.bin";
const arriving = {}, arrived = new Set();

/** 动手时才取网络的文件；取到之前画面用帧。返回都取到没有：取不到只说一句话，帧照用。 */
async function need(...files) {
  if (files.every((file) => arrived.has(file))) return true;
  $("#status").textContent = "正在取网络……画面先用算好的帧。";
  try {
    await Promise.all(files.map((file) => (arriving[file] ??= fetchWeights(file))));
  } catch {
    $("#status").textContent = "网络没有取到：旋钮仍能转，画面用算好的帧，一次只看一个；刷新页面可以再试。";
    return false;
  }
  $("#status").textContent = "网络到了，每一帧都在这里现算。";
  soon(draw);
  return true;
}

async function fetchWeights(file) {
  network.add(readTensors(await take(file), manifest.tensors[file]));
  arrived.add(file);
}

function begin() {
  before = Float32Array.from(z);
}

/** 把许多次改动合成一帧里的一次重画。 */
const pending = new Set();
function soon(work) {
  if (!pending.size) {
    requestAnimationFrame(() => {
      const works = [...pending];
      pending.clear();
      works.forEach((each) => each());
    });
  }
  pending.add(work);
}

const percent = (value) => `${Math.round(100 * value)}%`;

/** 两张脸与全部旋钮，照现在的 factors 与 z 画一遍。 */
function draw() {
  const face = drawFace(factors), columns = manifest.positions.length;
  const still = last === null || last === "factors"; // 没有网络时，右边停在开头的脸
  if (last === "factors" && arrived.has(ENCODER)) z = network.encode(face);
  show($("#real-face"), face);
  if (arrived.has(DECODER)) {
    show($("#vae-face"), toPixels(network.decode(z)));
  } else if (still) {
    showFrame($("#vae-face"), samples, samples.index.start, columns);
  } else {
    const column = Math.round((z[manifest.knobs[last].latent] + BIG) / (manifest.positions[1] - manifest.positions[0]));
    showFrame($("#vae-face"), frames, last * columns + clip(column, 0, columns - 1), columns);
  }
  const told = still ? [0, 1, 2, 3, 4, 5] : [last];
  const words = told.map((row) => `旋钮 ${row + 1} 在 ${z[manifest.knobs[row].latent].toFixed(1)}`);
  $("#vae-face").setAttribute("aria-label", `VAE 画的脸：${words.join("，")}`);
  $("#real-face").setAttribute("aria-label", `公式画的脸：${manifest.factors.map(({ label }, i) => `${label} ${percent(factors[i])}`).join("，")}`);
  dials.factors.forEach((dial, i) => dial.set(factors[i]));
  dials.learned.forEach((dial, i) => {
    const j = manifest.knobs[i].latent;
    dial.set(z[j], last === "factors" ? clip(Math.abs(z[j] - before[j]) - 0.15, 0, 1) : 0);
  });
}

function turnFactor(i, value) {
  factors[i] = value;
  last = "factors";
  need(DECODER, ENCODER);
  soon(draw);
}

function turnKnob(row, value) {
  if (!arrived.has(DECODER) && last !== row) z = Float32Array.from(manifest.start.z); // 帧只转一个旋钮，其余停在开头
  z[manifest.knobs[row].latent] = value;
  last = row;
  need(DECODER);
  soon(draw);
}

/** 把一组隐变量拧到旋钮上。 */
async function setKnobs(values) {
  if (!(await need(DECODER))) return;
  z = Float32Array.from(values);
  last = 0;
  draw();
}

function makeDials() {
  const learned = manifest.knobs.map(({ kld, active, factor, share }, row) => {
    const { label } = manifest.factors.find(({ name }) => name === factor);
    const idle = active && kld >= 0.1 ? "" : active ? "几乎没用" : "没用上";
    const title = `学到的旋钮 ${row + 1}，KL ${kld} nat，${idle || `最像${label}，${percent(share)}`}`;
    const detail = idle || (share >= 0.25 ? `${label} ${percent(share)}` : "混着的");
    const knob = { label: `${row + 1}`, detail, low: -BIG, high: BIG, rest: 0, step: 0.2, title, unused: Boolean(idle) };
    return new Dial(knob, (value) => turnKnob(row, value));
  });
  const real = manifest.factors.map(({ label }, i) => {
    return new Dial({ label, low: 0, high: 1, rest: 0.5, step: 0.05, title: `真的旋钮：${label}` }, (value) => turnFactor(i, value));
  });
  dials = { factors: real, learned };
  $("#real .dials").append(...real.map(({ element }) => element));
  $("#learned .dials").append(...learned.map(({ element }) => element));
  const idle = learned.filter(({ element }) => element.classList.contains("unused")).length;
  if (idle) $("#idle").textContent = `有 ${idle} 个旋钮几乎没有用上：它们带的信息抵不过 KL 那一项的价钱。`;
  const { prior, fitted, rebuilt } = manifest.distance;
  $("#distance").textContent = `到最近一张训练脸的 MSE，前者平均 ${prior.toFixed(3)}，后者 ${fitted.toFixed(3)}；测试图的重建是 ${rebuilt.toFixed(3)}。`;
  const { latent, pixels } = manifest.midway;
  $("#midway").textContent = `三百对测试脸的半路上，到最近一张训练脸的 MSE：前者平均 ${latent.toFixed(3)}，后者 ${pixels.toFixed(3)}。`;
  for (const { face } of [...real, ...learned]) face.addEventListener("focus", begin);
}

function home() {
  factors = [...manifest.start.factors];
  z = Float32Array.from(manifest.start.z);
  last = null;
  begin();
  draw();
}

// ---------------------------------------------------------------- 抽样

/** 标准正态的一个数（Box–Muller）。 */
function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function makeTiles() {
  for (const [name, words] of [["prior", "先验的样本"], ["fitted", "拟合的先验的样本"]]) {
    manifest.samples[name].forEach((_, i) => {
      const tile = document.createElement("button");
      tile.type = "button";
      tile.setAttribute("aria-label", `${words} ${i + 1}，拧到旋钮上`);
      tile.innerHTML = '<canvas width="64" height="64"></canvas>';
      tile.addEventListener("click", () => {
        setKnobs(manifest.samples[name][i]);
        $(".screens").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "nearest" });
      });
      $(`#${name}`).append(tile);
      showFrame(tile.firstChild, samples, samples.index[name] + i, manifest.positions.length);
    });
  }
}

async function drawAgain() {
  if (!(await need(DECODER))) return;
  $("#again").disabled = true;
  for (const name of ["prior", "fitted"]) {
    const tiles = $(`#${name}`).querySelectorAll("canvas");
    for (let i = 0; i < tiles.length; i++) {
      const drawn = name === "prior" ? Array.from(z, normal) : network.sampleFitted(normal);
      manifest.samples[name][i] = drawn;
      show(tiles[i], toPixels(network.decode(drawn)));
      if (i % 2) await new Promise(requestAnimationFrame); // 让页面喘口气
    }
  }
  $("#again").disabled = false;
}

// ---------------------------------------------------------------- 走直线

const ends = [0, 1]; // 起点与终点各是 manifest.faces 的第几张
let playing = false;

function drawWalk() {
  const t = $("#t").value / 100, [a, b] = ends.map((i) => manifest.faces[i]);
  const [from, to] = [a, b].map((face) => drawFace(face.factors));
  show($("#from canvas"), from);
  show($("#to canvas"), to);
  show($("#blend"), from.map((v, i) => Math.round(v + t * (to[i] - v))));
  if (arrived.has(DECODER)) show($("#straight"), toPixels(network.decode(a.z.map((v, i) => v + t * (b.z[i] - v)))));
  else showFrame($("#straight"), samples, samples.index.walk + Math.round(t * (manifest.positions.length - 1)), manifest.positions.length);
  $("#where").textContent = percent(t);
  $("#straight").setAttribute("aria-label", `隐变量里走了 ${percent(t)}：仍是一张脸`);
  $("#blend").setAttribute("aria-label", `像素平均到 ${percent(t)}：两张脸叠着`);
}

async function changeEnd(which) {
  if (!(await need(DECODER))) return;
  do ends[which] = (ends[which] + 1) % manifest.faces.length;
  while (ends[0] === ends[1]);
  drawWalk();
}

function play(on) {
  playing = on;
  $("#play").setAttribute("aria-pressed", on);
  $("#play").textContent = on ? "停下" : "走一遍";
  if (!on) return;
  const began = performance.now(), start = Number($("#t").value) >= 100 ? 0 : Number($("#t").value);
  const step = (now) => {
    if (!playing) return;
    const t = start + (now - began) / 40; // 四秒走完全程
    $("#t").value = Math.min(100, t);
    drawWalk();
    if (t < 100) requestAnimationFrame(step);
    else play(false);
  };
  requestAnimationFrame(step);
}

// ---------------------------------------------------------------- 开始

async function start() {
  const [text, ...sheets] = await Promise.all([take("manifest.json"), picture("frames.webp"), picture("samples.webp")]);
  manifest = JSON.parse(new TextDecoder().decode(text));
  [frames, samples] = sheets;
  network = new Network(manifest.model);
  const walk = manifest.positions.length, count = manifest.samples.prior.length;
  samples.index = { walk: 0, prior: walk, fitted: walk + count, start: walk + 2 * count };
  makeDials();
  makeTiles();
  home();
  drawWalk();
  $("main").hidden = false;
  $("#random").addEventListener("click", () => {
    begin();
    factors = factors.map(Math.random);
    last = "factors";
    need(DECODER, ENCODER);
    draw();
  });
  $("#reset").addEventListener("click", home);
  $("#again").addEventListener("click", drawAgain);
  $("#from").addEventListener("click", () => changeEnd(0));
  $("#to").addEventListener("click", () => changeEnd(1));
  $("#play").addEventListener("click", () => play(!playing));
  $("#t").addEventListener("input", () => {
    play(false);
    need(DECODER).then(drawWalk);
    soon(drawWalk);
  });
}

start().catch((error) => {
  const words = document.createElement("p");
  words.className = "broken";
  words.textContent = `这一页的数据没有取到（${error.message}），旋钮转不起来；请刷新再试，或重新拼一遍：python tools/explorer.py --assemble 文件夹`;
  $("header").append(words);
});
