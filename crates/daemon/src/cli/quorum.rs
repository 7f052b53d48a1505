//! `quorum` and `witness`: votes, and the third one.

use super::args::{DEFAULT_DIR, QuorumCommand, WitnessChoice, WitnessCommand};
use super::error::CliError;
use super::output::{Output, Tone, cell, count, say, span, trimmed};
use super::{Context, setup, show};
use jiff::tz::TimeZone;
use quorate_api::quorum::{
    QuorumChanged, QuorumRequest, QuorumView, RecommendationView, VoterKind, VoterView, WitnessKind,
};
use quorate_api::view::{JoinToken, TokenRequest};
use quorate_types::{Millis, PoolName};
use std::path::{Path, PathBuf};

/// Where a witness keeps its state unless told otherwise: apart from a host's.
const WITNESS_DIR: &str = "/var/lib/quorate-witness";
/// How long a token for a witness is good.
const TOKEN_TTL: Millis = Millis::secs(3600);

pub(crate) async fn run(context: &Context, command: QuorumCommand) -> Result<(), CliError> {
    match command {
        QuorumCommand::Show => {
            let view = view(context).await?;
            context.output.print(&view, |out| page(out, &view))
        }
        QuorumCommand::Recommend => {
            let found = view(context).await?.recommendation;
            context
                .output
                .print(&found, |out| recommendation(out, &found))
        }
        QuorumCommand::Set {
            witness,
            pool,
            disk,
            force,
        } => {
            let witness = match witness {
                WitnessChoice::Remote => return remote(context, pool).await,
                WitnessChoice::Disk => WitnessKind::Disk,
                WitnessChoice::None => WitnessKind::None,
            };
            let request = QuorumRequest {
                witness,
                pool,
                disk,
                force,
            };
            set(context, &request).await
        }
    }
}

async fn view(context: &Context) -> Result<QuorumView, CliError> {
    Ok(context.client.get("/api/v1/quorum").await?)
}

async fn set(context: &Context, request: &QuorumRequest) -> Result<(), CliError> {
    let changed: QuorumChanged = context.client.put("/api/v1/quorum", request).await?;
    context.output.print(&changed, |_| {
        let events = changed.events.iter().map(|event| event.text.clone());
        let mut lines: Vec<String> = events.collect();
        if lines.is_empty() {
            lines.push("Nothing to change: it is so already.".to_owned());
        }
        lines.extend(changed.consequences.clone());
        lines.join("\n")
    })
}

/// A remote witness joins by itself: it gets a token.
async fn remote(context: &Context, pool: Option<PoolName>) -> Result<(), CliError> {
    if pool.is_some() {
        return Err(CliError::Usage(
            "a remote witness has no pool: leave --pool out".to_owned(),
        ));
    }
    let request = TokenRequest {
        ttl: TOKEN_TTL,
        witness: true,
    };
    let token: JoinToken = context.client.post("/api/v1/tokens", &request).await?;
    context.output.print(&token, |_| {
        format!(
            "quorate witness join {} --address ADDRESS:PORT",
            token.token
        )
    })?;
    if context.output.is_table() {
        let until = show::time(token.expires, &TimeZone::system());
        eprintln!(
            "\nRun this on any third machine until {until}, with the address and port where the hosts reach it; then there:\n  systemctl enable --now quorate-witness     # or: quorate witness serve\nIt takes the place of a witness that is there now."
        );
    }
    Ok(())
}

/// `quorate quorum show`.
pub(crate) fn page(out: &Output, view: &QuorumView) -> String {
    let mut parts = vec![headline(out, view), String::new()];
    let mut table = out.table(&["VOTER", "KIND", "VOTE", "STATE"]);
    for voter in &view.voters {
        let kind = match voter.kind {
            VoterKind::Host => "host",
            VoterKind::Witness => "witness",
        };
        let (state, tone) = state(voter, view.leader.as_ref().map(|leader| leader.as_str()));
        table.add_row([
            cell(&voter.name, Tone::Bold),
            cell(kind, Tone::Plain),
            cell(if voter.votes { "yes" } else { "no" }, Tone::Plain),
            cell(state, tone),
        ]);
    }
    parts.push(trimmed(&table));
    if !view.problems.is_empty() {
        parts.push(String::new());
        let bad = |text: &String| format!("{} {text}", out.paint(Tone::Warn, "!"));
        parts.extend(view.problems.iter().map(bad));
    }
    if !view.recommendation.satisfied {
        parts.push(String::new());
        let text = format!(
            "{}: {} (`quorate quorum recommend` says more)",
            view.recommendation.summary,
            view.recommendation
                .reasons
                .first()
                .map_or("", String::as_str)
        );
        parts.push(out.paint(Tone::Dim, &text));
    }
    parts.join("\n")
}

fn state(voter: &VoterView, leader: Option<&str>) -> (String, Tone) {
    match (voter.up, voter.left, voter.silent_ms) {
        (true, ..) if leader == Some(voter.name.as_str()) => ("up, leads".to_owned(), Tone::Good),
        (true, ..) if voter.caught_up => ("up".to_owned(), Tone::Good),
        (true, ..) => ("up, catching up".to_owned(), Tone::Busy),
        (false, true, _) => ("stopped in order".to_owned(), Tone::Dim),
        (false, false, Some(silent)) => (format!("silent for {}", span(silent)), Tone::Bad),
        (false, false, None) => ("unknown".to_owned(), Tone::Dim),
    }
}

fn headline(out: &Output, view: &QuorumView) -> String {
    if !view.quorate {
        return out.paint(Tone::Bad, "No quorum is known here.");
    }
    let votes = format!("{} of {} answer", view.votes_up, count(view.votes, "vote"));
    let (tone, text) = match view.survives {
        0 => (Tone::Warn, "no further voter may fail".to_owned()),
        1 => (Tone::Good, "any one voter may fail".to_owned()),
        n => (Tone::Good, format!("any {n} voters may fail")),
    };
    out.paint(tone, &format!("Quorate: {votes}; {text}."))
}

/// `quorate quorum recommend`.
pub(crate) fn recommendation(out: &Output, found: &RecommendationView) -> String {
    let tone = if found.satisfied {
        Tone::Good
    } else {
        Tone::Warn
    };
    let mut parts = vec![out.paint(tone, &sentence(&found.summary))];
    parts.extend(found.reasons.iter().map(|reason| format!("- {reason}")));
    parts.push(String::new());
    let mut table = out.table(&["WITNESS", "VOTES", "SURVIVES", "REMARKS"]);
    for option in &found.options {
        let name = match option.witness {
            WitnessKind::None => "none",
            WitnessKind::Disk => "disk",
            WitnessKind::Remote => "remote",
        };
        table.add_row([
            cell(name, Tone::Bold),
            cell(option.votes, Tone::Plain),
            cell(option.survives, Tone::Plain),
            cell(&option.why, Tone::Plain),
        ]);
    }
    parts.push(trimmed(&table));
    parts.join("\n")
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), letters.as_str())
}

pub(crate) async fn witness(context: &Context, command: WitnessCommand) -> Result<(), CliError> {
    let dir = witness_dir(&context.dir);
    match command {
        WitnessCommand::Join(args) => {
            let name = setup::host_name(args.name)?;
            let token = setup::token(args.token)?;
            let node = crate::serve::join_witness(&dir, &token, name, &args.address).await?;
            let at = match dir == Path::new(WITNESS_DIR) {
                true => String::new(),
                false => format!(" --dir {}", dir.display()),
            };
            say(&format!(
                "{} is now the witness of cluster {}.\n\nNow run it:\n  quorate witness{at} serve",
                node.host, node.cluster_name
            ))
        }
        WitnessCommand::Serve => {
            crate::serve::log_to_stderr();
            Ok(crate::serve::serve_witness(&dir).await?)
        }
    }
}

fn witness_dir(given: &Path) -> PathBuf {
    if given == Path::new(DEFAULT_DIR) {
        WITNESS_DIR.into()
    } else {
        given.to_owned()
    }
}
