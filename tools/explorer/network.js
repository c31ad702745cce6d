// 训练好的 VAE，在浏览器里从头算：vanilla_vae.py 的 encode（只要 mu）与 decode，批归一化用运行统计量（eval）。
// 不用任何库：一层一个函数，[C, H, W] 的数排成一串；权重是 float32，中间的数是 float64，比 torch 的还准一些。
"use strict";

/** float16 的位 → 数：1 位符号，5 位指数，10 位尾数。 */
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24; // 次正规数
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** 一个文件里的全部张量：{ 名字: Float32Array }；entries 取自 manifest.json。 */
function readTensors(buffer, entries) {
  const view = new DataView(buffer), tensors = {};
  for (const { name, shape, offset } of entries) {
    const count = shape.reduce((a, b) => a * b, 1);
    tensors[name] = Float32Array.from({ length: count }, (_, i) => fromHalf(view.getUint16(offset + 2 * i, true)));
  }
  return tensors;
}

/** 全连接：y = W x + b，W 是 [输出, 输入]。 */
function linear(x, weight, bias) {
  return Float64Array.from(bias, (sum, o) => {
    for (let i = 0, at = o * x.length; i < x.length; i++, at++) sum += weight[at] * x[i];
    return sum;
  });
}

/** 每个通道的四边各补 before、after 圈 0：[C, n, n] → [C, n + before + after, n + before + after]。 */
function pad(x, n, before, after) {
  const size = n + before + after, channels = x.length / (n * n), y = new Float64Array(channels * size * size);
  for (let row = 0; row < channels * n; row++) {
    const to = (Math.floor(row / n) * size + before + (row % n)) * size + before;
    y.set(x.subarray(row * n, (row + 1) * n), to);
  }
  return y;
}

/** 3×3 卷积，padding=1，步长 stride：[C, n, n] → [K, n/stride, n/stride]，权重 [K, C, 3, 3]。 */
function conv(x, n, weight, bias, stride) {
  const channels = x.length / (n * n), m = n / stride, wide = n + 2;
  const input = pad(x, n, 1, 1), y = new Float64Array(bias.length * m * m);
  for (let k = 0; k < bias.length; k++) {
    y.fill(bias[k], k * m * m, (k + 1) * m * m);
    for (let c = 0; c < channels; c++) {
      const w = weight.subarray((k * channels + c) * 9, (k * channels + c + 1) * 9);
      const w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5], w6 = w[6], w7 = w[7], w8 = w[8];
      for (let i = 0, to = k * m * m; i < m; i++) {
        let a = (c * wide + stride * i) * wide, b = a + wide, d = b + wide; // 核盖住的三行
        for (let j = 0; j < m; j++, to++, a += stride, b += stride, d += stride) {
          y[to] +=
            w0 * input[a] + w1 * input[a + 1] + w2 * input[a + 2] +
            w3 * input[b] + w4 * input[b + 1] + w5 * input[b + 2] +
            w6 * input[d] + w7 * input[d + 1] + w8 * input[d + 2];
        }
      }
    }
  }
  return y;
}

/**
 * 转置卷积，3×3，stride=2，padding=1，output_padding=1：[C, n, n] → [K, 2n, 2n]，权重 [C, K, 3, 3]。
 * 输入的 (i, j) 把核盖在输出的 (2i − 1 … 2i + 1, 2j − 1 … 2j + 1)；反过来看，输出的四种位置各由一、二、二、四个输入得来。
 */
function convTranspose(x, n, weight, bias) {
  const channels = x.length / (n * n), m = 2 * n, wide = n + 1;
  const input = pad(x, n, 0, 1), y = new Float64Array(bias.length * m * m);
  for (let k = 0; k < bias.length; k++) {
    y.fill(bias[k], k * m * m, (k + 1) * m * m);
    for (let c = 0; c < channels; c++) {
      const at = (c * bias.length + k) * 9, w = weight.subarray(at, at + 9);
      const w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5], w6 = w[6], w7 = w[7], w8 = w[8];
      for (let i = 0; i < n; i++) {
        let from = (c * wide + i) * wide, to = (k * m + 2 * i) * m;
        for (let j = 0; j < n; j++, from++, to += 2) {
          const here = input[from], right = input[from + 1], below = input[from + wide], across = input[from + wide + 1];
          y[to] += w4 * here;
          y[to + 1] += w5 * here + w3 * right;
          y[to + m] += w7 * here + w1 * below;
          y[to + m + 1] += w8 * here + w6 * right + w2 * below + w0 * across;
        }
      }
    }
  }
  return y;
}

class Network {
  /** model 是 manifest.json 里的构造参数；张量陆续由 add 放进来。 */
  constructor(model) {
    this.model = model;
    this.tensors = {};
  }

  add(tensors) {
    Object.assign(this.tensors, tensors);
  }

  weights(name) {
    return [this.tensors[`${name}.weight`], this.tensors[`${name}.bias`]];
  }

  /** 批归一化与 LeakyReLU，就地：每个通道 (x − 均值)/√(方差 + 1e-5)·γ + β，负的再乘 0.01。 */
  normalize(x, name) {
    const [gamma, beta] = this.weights(name);
    const mean = this.tensors[`${name}.running_mean`], variance = this.tensors[`${name}.running_var`];
    const area = x.length / gamma.length;
    for (let c = 0; c < gamma.length; c++) {
      const scale = gamma[c] / Math.sqrt(variance[c] + 1e-5), shift = beta[c] - mean[c] * scale;
      for (let i = c * area; i < (c + 1) * area; i++) {
        const value = x[i] * scale + shift;
        x[i] = value < 0 ? 0.01 * value : value;
      }
    }
    return x;
  }

  /** 隐变量（L 个数）→ 图像，Float64Array，[C, H, W]，值域 (−1, 1)。 */
  decode(z) {
    const levels = this.model.hidden_dims.length;
    let n = this.model.image_size / 2 ** levels;
    let x = linear(Float64Array.from(z), ...this.weights("decoder_input"));
    for (let level = 0; level < levels; level++, n *= 2) {
      const name = level < levels - 1 ? `decoder.${level}` : "final_layer";
      x = this.normalize(convTranspose(x, n, ...this.weights(`${name}.0`)), `${name}.1`);
    }
    return conv(x, n, ...this.weights("final_layer.3"), 1).map(Math.tanh);
  }

  /** 图像 uint8 [C, H, W] → mu（L 个数）。 */
  encode(pixels) {
    let n = this.model.image_size;
    let x = Float64Array.from(pixels).map((v) => v / 127.5 - 1);
    for (let level = 0; level < this.model.hidden_dims.length; level++, n /= 2) {
      x = this.normalize(conv(x, n, ...this.weights(`encoder.${level}.0`), 2), `encoder.${level}.1`);
    }
    return linear(x, ...this.weights("fc_mu"));
  }

  /** 从拟合的先验（混合高斯 Σ π N(m, FFᵀ)）抽一个 z；normal() 给出一个标准正态的数。 */
  sampleFitted(normal) {
    const { "prior.weights": shares, "prior.means": means, "prior.factors": factors } = this.tensors;
    const size = this.model.latent_dim, eps = Array.from({ length: size }, normal);
    let k = 0;
    for (let left = Math.random(); k < shares.length - 1 && left >= shares[k]; k++) left -= shares[k];
    return eps.map((_, i) => eps.reduce((sum, e, j) => sum + factors[(k * size + i) * size + j] * e, means[k * size + i]));
  }
}

/** 图像 (−1, 1) → uint8，四舍五入，逢半取偶，与 torch.round 相同：Uint8ClampedArray 存数时自己就这样做，并截在 [0, 255]。 */
function toPixels(image) {
  const pixels = new Uint8ClampedArray(image.length);
  for (let i = 0; i < image.length; i++) pixels[i] = (image[i] + 1) * 127.5;
  return pixels;
}
