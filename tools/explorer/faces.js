// 按公式画脸：vaelab/faces.py 的 draw_faces，一行一行照搬，画出同样的字节。
//
// Python 那边全是 float32，JavaScript 的数是 float64，所以每做一次加减乘除都用 Math.fround 舍入一次。
// float32 的加减乘除与开方，先在 float64 里算再舍入，与直接算的逐位相同（float64 的位数多出一倍还不止）。
"use strict";

const f = Math.fround;
const add = (a, b) => f(f(a) + f(b));
const sub = (a, b) => f(f(a) - f(b));
const mul = (a, b) => f(f(a) * f(b));
const div = (a, b) => f(f(a) / f(b));
const root = (a) => f(Math.sqrt(a));
const clip = (a, low, high) => Math.min(Math.max(a, low), high);

/** 色相（0–1 绕色环一周）→ 饱和的 RGB。 */
function hueColor(h) {
  h = mul(h, 6);
  return [sub(Math.abs(sub(h, 3)), 1), sub(2, Math.abs(sub(h, 2))), sub(2, Math.abs(sub(h, 4)))].map((v) => clip(v, 0, 1));
}

/** 十二个因子（各在 0 与 1 之间，次序同 FACE_FACTORS）→ 一张脸，Uint8Array，[3, size, size]。 */
function drawFace(factors, size = 64) {
  const [skin, hue, length, width, gap, eye, gaze, brow, curve, mouth, pose, back] = factors.map(f);
  const view = 0.9; // 画面半宽
  const axis = Array.from({ length: size }, (_, i) => mul(sub(div(2 * i + 1, size), 1), view)); // 像素中心
  const canvas = new Float32Array(3 * size * size);
  const everything = [0, size];

  /** 每一行、每一列算一次颜色，[r, g, b] 各乘加。 */
  const tint = (rgb, scale, shift) => rgb.map((v) => add(mul(v, scale), shift));
  const shadeOf = (rgb, scale) => rgb.map((v) => mul(v, scale));

  const rows = (top, bottom) => [
    Math.max(0, Math.trunc(((top / view + 1) / 2) * size) - 1),
    Math.min(size, Math.trunc(((bottom / view + 1) / 2) * size) + 2),
  ];

  /** 把一个形状叠到画布上：distance(x, y) 是到边界的有符号距离，覆盖率由它得到（抗锯齿）。 */
  function paint(distance, color, [top, bottom] = everything, alpha = 1) {
    const slope = size / 2 / view;
    for (let r = top; r < bottom; r++) {
      for (let c = 0; c < size; c++) {
        let cover = clip(sub(0.5, mul(distance(axis[c], axis[r]), slope)), 0, 1);
        if (alpha !== 1) cover = mul(cover, alpha);
        if (cover === 0) continue; // 加上的是 0
        for (let k = 0, at = r * size + c; k < 3; k++, at += size * size) {
          canvas[at] = add(canvas[at], mul(cover, sub(color[k], canvas[at])));
        }
      }
    }
  }

  function ellipse(cx, cy, rx, ry) {
    return (x, y) => {
      let u = div(sub(x, cx), rx), v = div(sub(y, cy), ry);
      const norm = root(add(mul(u, u), mul(v, v)));
      u = div(u, rx), v = div(v, ry);
      return div(mul(norm, sub(norm, 1)), add(root(add(mul(u, u), mul(v, v))), 1e-6));
    };
  }
  const both = (a, b) => (x, y) => Math.max(a(x, y), b(x, y)); // 交
  const either = (a, b) => (x, y) => Math.min(a(x, y), b(x, y)); // 并

  const light = [1.0, 0.86, 0.74], dark = [0.47, 0.29, 0.19];
  const skinColor = dark.map((d, k) => add(d, mul(skin, sub(light[k], d))));
  const shade = shadeOf(skinColor, 0.82);
  const hairColor = tint(hueColor(hue), 0.5, 0.12);
  const turn = mul(sub(pose, 0.5), 0.24); // 五官随头转动的水平位移；耳朵与后发反向
  const rx = add(0.45, mul(sub(width, 0.5), 0.16)), ry = 0.56, cy = 0.02;

  // 背景
  tint(hueColor(back), 0.3, 0.6).forEach((v, k) => {
    for (let r = 0; r < size; r++) {
      canvas.fill(sub(v, mul(axis[r], 0.06)), (k * size + r) * size, (k * size + r + 1) * size);
    }
  });

  // 后发：头后的椭圆，向下延伸到 length
  const bottom = add(0.1, mul(length, 0.75));
  const box = (x, y) => {
    const boxX = sub(Math.abs(add(x, mul(turn, 0.3))), add(rx, 0.1));
    const boxY = sub(Math.abs(sub(y, div(sub(bottom, 0.2), 2))), div(add(bottom, 0.2), 2));
    const cornerX = Math.max(add(boxX, 0.2), 0), cornerY = Math.max(add(boxY, 0.2), 0);
    return sub(root(add(mul(cornerX, cornerX), mul(cornerY, cornerY))), 0.2);
  };
  paint(either(ellipse(mul(-turn, 0.3), cy - 0.1, add(rx, 0.12), ry + 0.08), box), shadeOf(hairColor, 0.8));

  // 衣服、脖子、耳朵、头
  paint(ellipse(0, 1.16, 0.78, 0.46), [0.24, 0.33, 0.48], rows(0.6, 1));
  paint(ellipse(0, 0.55, 0.17, 0.3), shade, rows(0.3, 0.9));
  for (const side of [-1, 1]) {
    paint(ellipse(sub(mul(side, sub(rx, 0.01)), mul(turn, 0.25)), cy + 0.05, 0.09, 0.13), shade, rows(-0.2, 0.3));
  }
  paint(ellipse(0, cy, rx, ry), skinColor);

  // 刘海：头顶之内、发际线之上
  const hairline = (x) => {
    const dx = sub(x, mul(turn, 1.2));
    return add(sub(-0.27, mul(mul(dx, dx), 0.55)), mul(sub(x, turn), 0.12));
  };
  paint(both(ellipse(0, cy - 0.04, add(rx, 0.05), ry + 0.07), (x, y) => sub(y, hairline(x))), hairColor, rows(-0.8, 0.2));

  // 眼睛与眉毛
  const eyeX = add(0.085, mul(eye, 0.055)), eyeY = add(0.06, mul(eye, 0.07)), level = cy - 0.01;
  const band = rows(-0.32, 0.22);
  for (const side of [-1, 1]) {
    const cx = add(turn, mul(side, add(0.15, mul(gap, 0.08))));
    paint(ellipse(cx, level, add(eyeX, 0.018), add(eyeY, 0.018)), shadeOf(skinColor, 0.45), band);
    const white = ellipse(cx, level, eyeX, eyeY);
    paint(white, [0.98, 0.98, 0.98], band);
    const pupil = mul(eyeY, 0.68);
    paint(both(ellipse(add(cx, mul(sub(gaze, 0.5), 0.13)), level, pupil, pupil), white), [0.1, 0.09, 0.12], band);
    const lift = mul(mul(sub(brow, 0.5), 0.9), side);
    const steep = root(add(mul(lift, lift), 1));
    const arc = (x) => {
      const dx = sub(x, cx);
      return add(sub(sub(mul(dx, lift), 0.09), eyeY), mul(mul(dx, dx), 1.5));
    };
    const line = (x, y) => sub(div(Math.abs(sub(sub(y, level), arc(x))), steep), 0.032);
    paint(both(line, (x) => sub(Math.abs(sub(x, cx)), 0.12)), shadeOf(hairColor, 0.55), band);
  }

  // 鼻子、腮红、嘴
  const low = rows(0.02, 0.55);
  paint(ellipse(mul(turn, 1.25), 0.19, 0.05, 0.065), shade, low);
  for (const side of [-1, 1]) paint(ellipse(add(turn, side * 0.27), 0.22, 0.09, 0.06), [0.95, 0.45, 0.42], low, 0.28);
  const half = add(0.11, mul(mouth, 0.12));
  const bend = mul(mul(sub(curve, 0.35), half), 1.5);
  const lips = (x, y) => {
    const t = div(sub(x, turn), half);
    const slope = div(mul(mul(bend, 2), t), half);
    const off = sub(sub(y, 0.365), mul(bend, sub(0.5, mul(t, t))));
    return sub(div(Math.abs(off), root(add(mul(slope, slope), 1))), 0.034);
  };
  paint(both(lips, (x) => sub(Math.abs(sub(x, turn)), half)), [0.66, 0.18, 0.2], low);
  return Uint8Array.from(canvas.map((v) => add(mul(clip(v, 0, 1), 255), 0.5))); // 取整是截去小数
}
