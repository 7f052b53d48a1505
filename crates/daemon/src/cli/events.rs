//! `events` and `status`.

use super::args::{EventsArgs, Format, StatusArgs};
use super::error::CliError;
use super::output::say;
use super::{Context, show, status};
use futures_util::StreamExt as _;
use jiff::tz::TimeZone;
use quorate_api::ClientError;
use quorate_api::view::{ClusterView, EventView};
use std::time::{Duration, Instant};

/// A follower waits this long for a daemon that is away.
const AWAY: Duration = Duration::from_secs(60);
/// Time between two pages of `status --watch`.
const REFRESH: Duration = Duration::from_secs(1);

pub(crate) async fn status(context: &Context, args: StatusArgs) -> Result<(), CliError> {
    if !args.watch || !context.output.is_table() {
        let view: ClusterView = context.client.get("/api/v1/cluster").await?;
        return context.output.print(&view, |out| status::page(out, &view));
    }
    loop {
        let page = match context.client.get::<ClusterView>("/api/v1/cluster").await {
            Ok(view) => status::page(&context.output, &view),
            Err(error) => CliError::from(error).render(),
        };
        if context.output.width.is_some() {
            // Home, each line cleared to its end, then everything below.
            say(&format!(
                "\x1b[H{}\x1b[K\x1b[J",
                page.replace('\n', "\x1b[K\n")
            ))?;
        } else {
            say(&format!("{page}\n"))?;
        }
        tokio::time::sleep(REFRESH).await;
    }
}

pub(crate) async fn events(context: &Context, args: EventsArgs) -> Result<(), CliError> {
    let mut path = format!("/api/v1/events?limit={}", args.lines);
    if let Some(about) = &args.about {
        let safe = |c: char| c.is_ascii_alphanumeric() || "-/".contains(c);
        if !about.chars().all(safe) {
            return Err(CliError::Usage(format!(
                "`{about}` is no subject: write `vm/NAME` or `host/NAME`"
            )));
        }
        path.push_str(&format!("&subject={about}"));
    }
    // The newest of all first: what happens between the two requests is left to the stream.
    let newest: Vec<EventView> = context.client.get("/api/v1/events?limit=1").await?;
    let last = newest.last().map_or(0, |event| event.sequence);
    let mut list: Vec<EventView> = context.client.get(&path).await?;
    if args.follow {
        list.retain(|event| event.sequence <= last);
    }
    let zone = TimeZone::system();
    if !args.follow {
        return context.output.print(&list, |out| {
            let lines: Vec<String> = list
                .iter()
                .map(|event| show::event(out, event, &zone))
                .collect();
            lines.join("\n")
        });
    }
    for event in &list {
        line(context, event, &zone)?;
    }
    follow(context, &args, last, &zone).await
}

async fn follow(
    context: &Context,
    args: &EventsArgs,
    mut last: u64,
    zone: &TimeZone,
) -> Result<(), CliError> {
    let mut away_since: Option<Instant> = None;
    loop {
        let error = match context.client.events(last).await {
            Ok(mut stream) => {
                away_since = None;
                loop {
                    match stream.next().await {
                        Some(Ok(event)) => {
                            last = event.sequence;
                            if args
                                .about
                                .as_ref()
                                .is_none_or(|about| *about == event.subject)
                            {
                                line(context, &event, zone)?;
                            }
                        }
                        Some(Err(error)) => break error,
                        None => break ClientError::Broken("the stream ended".to_owned()),
                    }
                }
            }
            Err(error) => error,
        };
        if matches!(error, ClientError::Refused(_)) {
            return Err(error.into());
        }
        let since = *away_since.get_or_insert_with(Instant::now);
        if since.elapsed() > AWAY {
            return Err(error.into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// One event: a line for people, or one JSON document per line.
fn line(context: &Context, event: &EventView, zone: &TimeZone) -> Result<(), CliError> {
    match context.output.format {
        Format::Table => say(&show::event(&context.output, event, zone)),
        Format::Json | Format::Yaml => {
            let text = serde_json::to_string(event)
                .map_err(|error| CliError::Failed(error.to_string()))?;
            say(&text)
        }
    }
}
