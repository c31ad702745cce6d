// 在全部课程里找字。造站时，INDEX 写在这个文件的后面：[页, 页的标题, 锚点, 小节的标题, 文字] 的数组。
// 不分词：中文按原样找，“批归一化”就是这四个字；字与字之间有没有空格、大小写都不计较。
"use strict";
function pattern(word) {
  return new RegExp([...word].map((char) => char.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("\\s*"), "gi");
}

function matches(words) {
  const patterns = words.map(pattern);
  const found = [];
  for (const [page, title, anchor, section, text] of INDEX) {
    const whole = `${title} ${section} ${text}`;
    const counts = patterns.map((each) => (whole.match(each) || []).length);
    if (!counts.every(Boolean)) continue;
    // 写在标题里的在前，其次看提到几次
    const named = patterns.reduce((sum, each) => sum + 40 * (section.match(each) || []).length + 10 * (title.match(each) || []).length, 0);
    const first = text.search(patterns[0]);
    const start = Math.max(first - 24, 0);
    const excerpt = (start ? "…" : "") + text.slice(start, start + 90) + (start + 90 < text.length ? "…" : "");
    found.push({ url: anchor ? `${page}#${anchor}` : page, title, section, excerpt, score: named + counts.reduce((a, b) => a + b) });
  }
  return found.sort((a, b) => b.score - a.score);
}

/** 找得到 `query` 的小节，最相关的在前。空格隔开的几个词都要有；一处也没有时，把话切成词再找一次。 */
function find(query) {
  const words = query.trim().split(/\s+/).filter(Boolean);
  const exact = words.length ? matches(words) : [];
  if (exact.length || !words.length || !globalThis.Intl?.Segmenter) return { words, found: exact };
  const smaller = words.flatMap((word) => [...new Intl.Segmenter("zh", { granularity: "word" }).segment(word)].filter((each) => each.isWordLike).map((each) => each.segment));
  return { words: smaller, found: smaller.length ? matches(smaller) : [] };
}
