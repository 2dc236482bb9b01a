"""XML documents in any encoding that Python knows, without document types."""

from __future__ import annotations

import re
from typing import NoReturn
from xml.etree import ElementTree


class DocumentTypeError(ValueError):
    """A document has a type, and with it perhaps entities that could be expanded."""


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuse a document type, and with it every entity that could be expanded."""

    def doctype(self, *_: object) -> NoReturn:
        raise DocumentTypeError("it has a document type (<!DOCTYPE>), which no annotation needs")


def parse_xml(content: bytes) -> ElementTree.Element:
    """The root of an XML document, without namespaces.

    Expat knows few encodings, and some programs declare another one than they write. So a document
    that it refuses is also tried as text, in the declared encoding and in UTF-8.

    Raises:
        ElementTree.ParseError, ValueError, LookupError: it is not XML, or has a document type.
    """
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_TreeBuilder()))
    except DocumentTypeError:
        raise
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        declared = re.match(rb"<\?xml[^>]*encoding\s*=\s*[\"']([\w.-]+)", content)
        if declared is None:
            raise
        root = _parse_text(content, declared[1].decode(), error)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _parse_text(content: bytes, declared: str, error: Exception) -> ElementTree.Element:
    """Parse a document that expat refuses with ``error``, in its declared encoding or UTF-8."""
    for encoding in (declared, "utf-8"):
        try:
            text = content.decode(encoding)
            return ElementTree.fromstring(text, ElementTree.XMLParser(target=_TreeBuilder()))
        except DocumentTypeError:
            raise
        except (ElementTree.ParseError, ValueError, LookupError):  # of an unknown encoding
            continue
    raise error
