"""Reading the HTML of a report, and text that tries to break out of it."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror="alert(3)">',
    "' onmouseover='alert(4)",
    "{{ 7 * 7 }} {% raw %}",
    "</style></title></svg><b>bold</b>",
    "a & b &amp; c",
]


class Page(HTMLParser):
    """Elements with their attributes and their text; fails where a tag is closed that is not the open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}: {names}"
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for _, _, parts in self.open:
            parts.append(data)

    def all(self, tag, **attributes):
        return [
            (found, "".join(parts))
            for name, found, parts in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def texts(self, tag, **attributes):
        return [re.sub(r"\s+", " ", text).strip() for _, text in self.all(tag, **attributes)]
