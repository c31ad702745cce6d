"""装作 GitHub 的消毒器：笔记里的 HTML 去掉能运行的、能改样子的东西之后，还剩下什么图。"""

from html.parser import HTMLParser

GONE = {"script", "style", "input", "button", "select", "iframe", "object", "embed", "form", "link", "svg"}  # 连同里面的文字一起去掉
VOID = {"input", "embed", "link"}  # 没有结束标签的
KEPT = {"src", "alt", "width", "height", "href", "title"}


class _Sanitizer(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.pictures, self.text = 0, [], []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in GONE:
            self.inside += tag not in VOID
        elif tag == "img" and not self.inside:
            self.pictures.append({name: value for name, value in attributes if name in KEPT})

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in GONE - VOID

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text.append(data)


def sanitized(source: str) -> tuple[list[dict], str]:
    """消毒之后的图（各自剩下的属性）与文字。"""
    reader = _Sanitizer()
    reader.feed(source)
    reader.close()
    return reader.pictures, "".join(reader.text).strip()


def shows_a_still_picture(source: str) -> bool:
    """消毒之后还有自带内容（``data:``）、有文字说明的图，而且没有一处要到外面去取。"""
    pictures, _ = sanitized(source)
    inside = all(each.get("src", "").startswith("data:image/") and each.get("alt", "").strip() for each in pictures)
    return bool(pictures) and inside and "//" not in source.split("base64,")[0] and "http" not in source
