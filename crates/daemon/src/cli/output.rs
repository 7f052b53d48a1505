//! Printing: tables and colours for people, JSON and YAML for programs.

use super::args::{Format, Global};
use super::error::CliError;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, TableComponent};
use serde::Serialize;
use std::io::{IsTerminal as _, Write as _};

/// Width of lines where standard output is no terminal.
const PLAIN_WIDTH: u16 = 160;

/// How this run prints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
    pub(crate) color: bool,
    /// Columns of the terminal; absent: not a terminal.
    pub(crate) width: Option<u16>,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            format: global.output,
            color: terminal && !global.no_color && !no_color,
            width: terminal.then(terminal_width).flatten(),
        }
    }

    /// Prints a value as asked for; `table` makes it readable.
    pub(crate) fn print<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&Self) -> String,
    ) -> Result<(), CliError> {
        let text = match self.format {
            Format::Table => table(self),
            Format::Json => serde_json::to_string_pretty(value)
                .map_err(|error| CliError::Failed(error.to_string()))?,
            Format::Yaml => serde_saphyr::to_string(value)
                .map_err(|error| CliError::Failed(error.to_string()))?,
        };
        say(text.trim_end())
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    pub(crate) fn is_table(&self) -> bool {
        self.format == Format::Table
    }

    /// A table without frame: a line under the headings, two spaces between columns.
    pub(crate) fn table(&self, headings: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        for part in [
            TableComponent::HeaderLines,
            TableComponent::MiddleHeaderIntersections,
        ] {
            table.set_style(part, '─');
        }
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(self.width.unwrap_or(PLAIN_WIDTH).max(40));
        if self.color {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(
            headings
                .iter()
                .map(|heading| Cell::new(heading).add_attribute(Attribute::Bold)),
        );
        table
    }

    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Busy => "36",
            Tone::Warn => "33",
            Tone::Bad => "31;1",
            Tone::Dim => "2",
            Tone::Bold => "1",
            Tone::Plain => return text.to_owned(),
        };
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// What a colour means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Busy,
    Warn,
    Bad,
    Dim,
    Bold,
    Plain,
}

/// A cell in a tone.
pub(crate) fn cell(text: impl ToString, tone: Tone) -> Cell {
    let cell = Cell::new(text);
    match tone {
        Tone::Good => cell.fg(Color::Green),
        Tone::Busy => cell.fg(Color::Cyan),
        Tone::Warn => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red).add_attribute(Attribute::Bold),
        Tone::Dim => cell.add_attribute(Attribute::Dim),
        Tone::Bold => cell.add_attribute(Attribute::Bold),
        Tone::Plain => cell,
    }
}

/// The table's text without blanks at the ends of lines.
pub(crate) fn trimmed(table: &Table) -> String {
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// Prints a line. A reader that has gone away is no error.
#[expect(
    clippy::disallowed_methods,
    reason = "a command whose reader is gone has nothing left to do or to undo"
)]
pub(crate) fn say(text: &str) -> Result<(), CliError> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

fn terminal_width() -> Option<u16> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

/// `1 VM`, `2 VMs`.
pub(crate) fn count(number: usize, one: &str) -> String {
    if number == 1 {
        format!("1 {one}")
    } else {
        format!("{number} {one}s")
    }
}

/// A number of bytes with three digits at most before the unit.
pub(crate) fn bytes(number: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = number as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 100.0 || unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// `0.4 s`, `12 s`, `3 min`, `2 h`, `5 d`.
pub(crate) fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..10 => format!("{}.{} s", seconds, millis % 1000 / 100),
        10..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
