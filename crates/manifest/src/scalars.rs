//! Single values: what their text means, and what to write instead when it means nothing.

use crate::schema::Kind;
use crate::suggest;
use quorate_types::service::PortRange;
use quorate_types::spec::Subnet;
use quorate_types::units::UnitError;
use quorate_types::{ByteSize, Millis, VmName};
use serde_json::Value;
use std::net::{IpAddr, Ipv6Addr};

/// A value that cannot be taken.
pub(crate) struct Wrong {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

fn wrong(message: impl Into<String>, hint: impl Into<String>) -> Wrong {
    Wrong {
        message: message.into(),
        hint: Some(hint.into()),
    }
}

/// "must be ...".
pub(crate) fn expected(kind: &Kind) -> &'static str {
    match kind {
        Kind::Name => "a name",
        Kind::Size => "a size such as `512MiB`",
        Kind::Duration => "a duration such as `2s`",
        Kind::Int(..) => "a whole number",
        Kind::Bool => "`true` or `false`",
        Kind::Choice(_) => "a word",
        Kind::Address => "an IP address",
        Kind::Address6 => "an IPv6 address",
        Kind::Subnet(_) => "a subnet such as `10.0.0.0/24`",
        Kind::Ports => "a port or a range of ports",
        _ => "a text",
    }
}

pub(crate) fn convert(text: &str, kind: &Kind) -> Result<Value, Wrong> {
    match kind {
        Kind::Name => VmName::new(text)
            .map(|_| text.into())
            .map_err(|error| Wrong {
                message: error.to_string(),
                hint: name_hint(text),
            }),
        Kind::Size => size(text),
        Kind::Duration => duration(text),
        Kind::Int(min, max) => integer(text, *min, *max),
        Kind::Bool => match text {
            "true" => Ok(true.into()),
            "false" => Ok(false.into()),
            _ => Err(Wrong {
                message: format!("`{text}` is neither `true` nor `false`"),
                hint: match text.to_lowercase().as_str() {
                    "yes" | "on" | "y" | "true" => Some("write `true`".into()),
                    "no" | "off" | "n" | "false" => Some("write `false`".into()),
                    _ => None,
                },
            }),
        },
        Kind::Choice(words) => {
            if words.contains(&text) {
                return Ok(text.into());
            }
            Err(Wrong {
                message: format!("`{text}` is not known here"),
                hint: suggest::hint(text, "use one of", words.iter().copied()),
            })
        }
        Kind::Address => text.parse::<IpAddr>().map(|_| text.into()).map_err(|_| {
            let hint = match text.split_once('/') {
                Some((address, _)) => format!("write it without the prefix length: `{address}`"),
                None => "write an IPv4 or IPv6 address such as `10.0.0.5`".to_owned(),
            };
            wrong(format!("`{text}` is not an IP address"), hint)
        }),
        Kind::Address6 => match text.parse::<Ipv6Addr>() {
            Ok(_) => Ok(text.into()),
            Err(_) if text.parse::<IpAddr>().is_ok() => Err(wrong(
                format!("`{text}` is not an IPv6 address"),
                "give an IPv4 address as `address`",
            )),
            Err(_) => Err(wrong(
                format!("`{text}` is not an IPv6 address"),
                "write an address such as `fd00::5`",
            )),
        },
        Kind::Subnet(v4) => subnet(text, *v4),
        Kind::Ports => match text.trim().parse::<PortRange>() {
            Ok(range) => Ok(range.to_string().into()),
            Err(error) => Err(wrong(
                error.to_string(),
                "write it as `80`, `5000-5010`, `53/udp`",
            )),
        },
        Kind::Text if text.is_empty() => Err(wrong("the text is empty", "give it a value")),
        _ => Ok(text.into()),
    }
}

fn subnet(text: &str, v4: bool) -> Result<Value, Wrong> {
    let (example, field) = match v4 {
        true => ("10.0.0.0/24", "subnet6"),
        false => ("fd00::/64", "subnet"),
    };
    match text.trim().parse::<Subnet>() {
        Ok(subnet) if subnet.address().is_ipv4() == v4 => Ok(subnet.to_string().into()),
        Ok(_) => Err(wrong(
            format!("`{text}` is of the other family"),
            format!("give it as `{field}`"),
        )),
        Err(error) => Err(wrong(error.to_string(), format!("as in `{example}`"))),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

fn size(text: &str) -> Result<Value, Wrong> {
    let (number, unit) = split_number(text.trim());
    if !number.is_empty() && unit.is_empty() {
        return Err(wrong(
            format!("`{text}` has no unit"),
            format!("write `{number}MiB` or `{number}GiB`"),
        ));
    }
    if number.contains('.') {
        let message = format!("`{text}` is not a whole number of bytes in a known unit");
        return Err(wrong(message, size_hint(number, unit)));
    }
    match text.parse::<ByteSize>() {
        Err(error @ UnitError::Overflow(_)) => {
            Err(wrong(error.to_string(), "sizes go up to 16777215TiB"))
        }
        Ok(size) => Ok(size.to_string().into()),
        Err(error) => Err(Wrong {
            message: error.to_string(),
            hint: Some(size_hint(number, unit)),
        }),
    }
}

fn size_hint(number: &str, unit: &str) -> String {
    let full = match unit.to_lowercase().trim_end_matches('s') {
        "k" | "kb" | "ki" | "kib" => "KiB",
        "m" | "mb" | "mi" | "mib" | "mo" => "MiB",
        "g" | "gb" | "gi" | "gib" | "go" => "GiB",
        "t" | "tb" | "ti" | "tib" => "TiB",
        _ => return "write a size such as `512MiB` or `4GiB`".to_owned(),
    };
    if number.is_empty() {
        return format!("put the number first, as in `512{full}`");
    }
    match (number.parse::<f64>(), full) {
        (Ok(n), "TiB") if number.contains('.') => format!("write `{}GiB`", (n * 1024.0) as u64),
        (Ok(n), "GiB") if number.contains('.') => format!("write `{}MiB`", (n * 1024.0) as u64),
        (Ok(n), "MiB") if number.contains('.') => format!("write `{}KiB`", (n * 1024.0) as u64),
        _ => format!("write `{number}{full}`"),
    }
}

fn duration(text: &str) -> Result<Value, Wrong> {
    let (number, unit) = split_number(text.trim());
    if !number.is_empty() && unit.is_empty() {
        return Err(wrong(
            format!("`{text}` has no unit"),
            format!("write `{number}s` or `{number}ms`"),
        ));
    }
    if number.contains('.') {
        let message = format!("`{text}` is not a whole number");
        return Err(wrong(message, duration_hint(number, unit)));
    }
    match text.parse::<Millis>() {
        Err(error @ UnitError::Overflow(_)) => Err(wrong(error.to_string(), "write it smaller")),
        Ok(span) => Ok(span.to_string().into()),
        Err(error) => Err(wrong(error.to_string(), duration_hint(number, unit))),
    }
}

fn duration_hint(number: &str, unit: &str) -> String {
    let unit = match unit.to_lowercase().as_str() {
        "s" | "sec" | "secs" | "second" | "seconds" => "s",
        "m" | "min" | "mins" | "minute" | "minutes" => "m",
        "h" | "hour" | "hours" | "hr" => "h",
        "ms" | "msec" | "millis" | "milliseconds" => "ms",
        _ => "",
    };
    match (number.parse::<f64>(), unit) {
        (Ok(n), "s") if number.contains('.') => format!("write `{}ms`", (n * 1000.0) as u64),
        (Ok(n), "m") if number.contains('.') => format!("write `{}s`", (n * 60.0) as u64),
        (Ok(n), "h") if number.contains('.') => format!("write `{}m`", (n * 60.0) as u64),
        (Ok(_), unit) if !unit.is_empty() && !number.contains('.') => {
            format!("write `{number}{unit}`")
        }
        _ => "write a duration such as `250ms`, `2s` or `5m`".to_owned(),
    }
}

fn integer(text: &str, min: i64, max: i64) -> Result<Value, Wrong> {
    match text.parse::<i64>() {
        Ok(n) if (min..=max).contains(&n) => Ok(n.into()),
        Ok(n) => Err(wrong(
            format!("{n} is out of range"),
            format!("it must be from {min} to {max}"),
        )),
        Err(_) => Err(wrong(
            format!("`{text}` is not a whole number"),
            format!("it must be from {min} to {max}"),
        )),
    }
}

/// A valid name made from the text, if one suggests itself.
pub(crate) fn name_hint(text: &str) -> Option<String> {
    let made: String = text
        .to_lowercase()
        .chars()
        .map(|c| if matches!(c, '_' | '.' | ' ') { '-' } else { c })
        .collect();
    let made = made.trim_matches('-');
    (made != text && VmName::new(made).is_ok()).then(|| format!("write `{made}`"))
}

/// The field of ours that a word of other tools means.
pub(crate) fn familiar(word: &str) -> Option<&'static str> {
    Some(match word {
        "cpu" | "vcpu" | "vcpus" | "cores" => "cpus",
        "mem" | "ram" | "mem_limit" => "memory",
        "interfaces" | "nic" | "network_interfaces" => "nics",
        "volumes" | "drives" | "disk" => "disks",
        "domains" | "virtual_machines" | "machines" | "vm" => "vms",
        "storage" | "datastores" => "pools",
        "affinity" | "anti_affinity" | "placement" => "rules",
        "healthcheck" | "readiness" | "readiness_probe" => "ready",
        _ => return None,
    })
}
