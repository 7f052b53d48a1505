//! "Did you mean": the known word nearest to a misspelt one.

/// The candidate that a reader would take the word for, if there is one ("did you mean").
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase().replace('-', "_");
    // A word of two letters is one edit away from every other.
    let allowed = (word.chars().count() / 3).min(3);
    candidates
        .into_iter()
        .map(|c| (distance(&lower, &c.to_lowercase().replace('-', "_")), c))
        .filter(|(d, _)| *d <= allowed)
        .min()
        .map(|(_, c)| c)
}

/// The hint for an unknown word: the nearest candidate, or the whole list when it is short.
pub(crate) fn hint<'a>(
    word: &str,
    what: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let all: Vec<&str> = candidates.into_iter().collect();
    if let Some(near) = nearest(word, all.iter().copied()) {
        return Some(format!("did you mean `{near}`?"));
    }
    if all.is_empty() {
        return None;
    }
    let shown: Vec<String> = all.iter().take(16).map(|c| format!("`{c}`")).collect();
    let more = if all.len() > 16 { ", ..." } else { "" };
    Some(format!("{what}: {}{more}", shown.join(", ")))
}

/// Edit distance with swaps of neighbours counted once (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1)
                .min(rows[i][j - 1] + 1)
                .min(rows[i - 1][j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_the_reader_meant() {
        assert_eq!(nearest("memroy", ["cpus", "memory"]), Some("memory"));
        assert_eq!(
            nearest("depends-on", ["depends_on", "hosts"]),
            Some("depends_on")
        );
        assert_eq!(nearest("dbb", ["app", "db"]), Some("db"));
        assert_eq!(nearest("zebra", ["app", "db"]), None);
        assert_eq!(nearest("web3", ["web1", "web2"]), Some("web1"));
    }
}
