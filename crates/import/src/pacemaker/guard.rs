//! Bounds, checked before the XML reader sees the text: size, depth, number of elements and
//! attributes, and no document type (so no entities that could grow).

use crate::{Place, Problem};

/// Largest text, in bytes.
pub const MAX_BYTES: usize = 64 << 20;
/// Deepest nesting of elements. A CIB needs about twelve.
pub const MAX_DEPTH: usize = 64;
/// Most elements.
pub const MAX_ELEMENTS: usize = 1_000_000;
/// Most attributes of one element.
pub const MAX_ATTRIBUTES: usize = 128;

/// Checks the bounds.
pub(super) fn check(text: &str) -> Result<(), Problem> {
    if text.len() > MAX_BYTES {
        let message = format!("{} bytes are too many for a CIB", text.len());
        return Err(Problem::new(Place { line: 1, column: 1 }, message)
            .hint(format!("at most {MAX_BYTES} bytes are read")));
    }
    Scan {
        text,
        at: 0,
        depth: 0,
        elements: 0,
    }
    .run()
}

/// The place of a byte.
pub(super) fn place(text: &str, at: usize) -> Place {
    let before = text.get(..at).unwrap_or(text);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |at| at + 1);
    let column = before[start..].chars().count() + 1;
    let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    Place {
        line: small(line),
        column: small(column),
    }
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    elements: usize,
}

impl Scan<'_> {
    fn run(mut self) -> Result<(), Problem> {
        while let Some(found) = self.rest().find('<') {
            self.at += found;
            let rest = self.rest();
            if rest.starts_with("<!--") {
                self.skip("-->");
            } else if rest.starts_with("<![CDATA[") {
                self.skip("]]>");
            } else if rest.starts_with("<!") {
                let hint =
                    "remove the <!DOCTYPE ...>: a CIB has none, and entities are not expanded";
                return Err(self.problem("a document type declaration").hint(hint));
            } else if rest.starts_with("<?") {
                self.skip("?>");
            } else if rest.starts_with("</") {
                self.depth = self.depth.saturating_sub(1);
                self.skip(">");
            } else {
                self.element()?;
            }
        }
        Ok(())
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip(&mut self, end: &str) {
        let length = self
            .rest()
            .find(end)
            .map_or(self.rest().len(), |at| at + end.len());
        self.at += length;
    }

    fn problem(&self, message: &str) -> Problem {
        Problem::new(place(self.text, self.at), message)
    }

    fn element(&mut self) -> Result<(), Problem> {
        self.elements += 1;
        if self.elements > MAX_ELEMENTS {
            return Err(self.problem(&format!("more than {MAX_ELEMENTS} elements")));
        }
        let mut quote = None;
        let mut attributes = 0;
        let mut last = b'<';
        let mut length = self.rest().len();
        for (at, byte) in self.rest().bytes().enumerate() {
            match (quote, byte) {
                (Some(open), byte) if open == byte => quote = None,
                (Some(_), _) => {}
                (None, b'"' | b'\'') => {
                    quote = Some(byte);
                    attributes += 1;
                }
                (None, b'>') => {
                    length = at + 1;
                    break;
                }
                (None, _) => {}
            }
            last = byte;
        }
        if attributes > MAX_ATTRIBUTES {
            let message = format!("more than {MAX_ATTRIBUTES} attributes in one element");
            return Err(self.problem(&message));
        }
        if last != b'/' {
            self.depth += 1;
        }
        if self.depth > MAX_DEPTH {
            return Err(self.problem(&format!("elements nested deeper than {MAX_DEPTH}")));
        }
        self.at += length;
        Ok(())
    }
}
