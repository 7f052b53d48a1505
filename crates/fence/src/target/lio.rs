//! LIO, the kernel's target, through its configfs.
//!
//! A shell at the SAN runs the steps, so nothing has to be installed there (`via: [ssh, root@san]`). Removing an
//! access entry makes the kernel end that initiator's sessions and wait for their last command before the call
//! returns (`core_tpg_del_initiator_node_acl`). The account of a login (CHAP) is kept in that entry and goes with it, so it is
//! written anew where a host is let in, from the pool's own. A portal group that makes entries for whoever comes
//! (`generate_node_acls`) has an open door, and is said so.

use super::{AccessRemoved, TargetAccess, TargetError, all, call, millis};
use tokio::time::Instant;

const ROOT: &str = "/sys/kernel/config/target/iscsi";

/// The steps; what they are about comes as parameters `ROOT TPG ACTION INITIATOR TARGET...`. One line for each target.
const SCRIPT: &str = r#"
root=$1 tpg=$2 action=$3 initiator=$4
shift 4
for target; do
    group=$root/$target/tpgt_$tpg
    entry=$group/acls/$initiator
    if [ ! -d "$group" ]; then echo "none $target"; continue; fi
    case $action in
    cut)
        if [ -d "$entry" ]; then
            for unit in "$entry"/lun_*; do
                [ -d "$unit" ] || continue
                for link in "$unit"/*; do if [ -L "$link" ]; then rm "$link"; fi; done
                rmdir "$unit"
            done
            rmdir "$entry"
        fi ;;
    allow)
        mkdir -p "$entry" || exit 1
        if [ -n "$user" ]; then
            printf %s "$user" > "$entry/auth/userid" && printf %s "$password" > "$entry/auth/password" || exit 1
        fi
        for unit in "$group"/lun/lun_*; do
            [ -d "$unit" ] || continue
            name=${unit##*/}
            if [ ! -e "$entry/$name" ]; then
                mkdir "$entry/$name" && ln -s "$unit" "$entry/$name/quorate" || exit 1
            fi
        done ;;
    esac
    if [ -d "$entry" ]; then echo "open $target"
    elif [ "$(cat "$group/attrib/generate_node_acls" 2>/dev/null)" = 1 ]; then echo "everybody $target"
    else echo "shut $target"
    fi
done
"#;

/// One LIO target.
#[derive(Debug, Clone)]
pub struct Lio {
    /// Target portal group.
    pub tpg: u32,
    /// Words before the shell.
    pub via: Vec<String>,
    root: String,
    account: Option<(String, String)>,
}

/// A text as one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

impl Lio {
    /// The target at the end of `via`; portal group 0 stands for 1.
    #[must_use]
    pub fn new(tpg: u32, via: Vec<String>) -> Self {
        Self {
            tpg: tpg.max(1),
            via,
            root: ROOT.to_owned(),
            account: None,
        }
    }

    /// With the name and the password by which hosts log in.
    #[must_use]
    pub fn with_account(self, account: Option<(String, String)>) -> Self {
        Self { account, ..self }
    }

    /// Carries `action` out; one word for each target.
    async fn act(
        &self,
        action: &str,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError> {
        let tpg = self.tpg.to_string();
        let fixed = ["sh", "-s", &self.root, &tpg, action, initiator];
        let own = fixed.iter().map(ToString::to_string);
        let words: Vec<String> = self
            .via
            .iter()
            .cloned()
            .chain(own)
            .chain(targets.iter().cloned())
            .collect();
        // On the standard input, where nobody else sees it, and only where it is needed.
        let account = self.account.as_ref().filter(|_| action == "allow");
        let (user, password) = account.cloned().unwrap_or_default();
        let script = format!(
            "user={} password={}\n{SCRIPT}",
            quoted(&user),
            quoted(&password)
        );
        let secrets: Vec<&str> = account.iter().map(|(_, secret)| secret.as_str()).collect();
        let text = call(&words, script, &secrets, deadline).await?;
        let said = |target: &String| {
            let line = text.lines().find_map(|line| {
                let (word, name) = line.split_once(' ')?;
                (name == target).then(|| word.to_owned())
            });
            line.ok_or_else(|| TargetError::Answer {
                program: "the shell at the SAN".to_owned(),
                detail: format!("nothing about {target}"),
            })
        };
        targets.iter().map(said).collect()
    }
}

#[async_trait::async_trait]
impl TargetAccess for Lio {
    async fn cut(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Vec<Result<AccessRemoved, TargetError>> {
        let begun = Instant::now();
        let words = match self.act("cut", targets, initiator, deadline).await {
            Ok(words) => words,
            Err(error) => return all(targets, &error),
        };
        let took_ms = millis(begun.elapsed());
        let verdict = |(target, word): (&String, String)| {
            let detail = match word.as_str() {
                "shut" | "none" => {
                    return Ok(AccessRemoved {
                        target: target.clone(),
                        how: "LIO removed its access entry, which ended its sessions".to_owned(),
                        took_ms,
                    });
                }
                "everybody" => {
                    "the portal group lets everybody in (generate_node_acls is 1): set it to 0"
                }
                _ => "its access entry is still there",
            };
            Err(TargetError::StillOpen {
                target: target.clone(),
                initiator: initiator.to_owned(),
                detail: detail.to_owned(),
            })
        };
        targets.iter().zip(words).map(verdict).collect()
    }

    async fn allow(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError> {
        let words = self.act("allow", targets, initiator, deadline).await?;
        let missing = targets.iter().zip(words);
        let missing = missing.filter(|(_, word)| word == "none");
        Ok(missing.map(|(target, _)| target.clone()).collect())
    }

    async fn allowed(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<bool>, TargetError> {
        let words = self.act("look", targets, initiator, deadline).await?;
        Ok(words.iter().map(|word| word == "open").collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test]
    async fn the_account_comes_back_with_the_entry() {
        let dir = tempfile::tempdir().unwrap();
        let target = "iqn.2026-01.com.example:a".to_owned();
        let entry = dir.path().join(&target).join("tpgt_1/acls/iqn.h1");
        // The kernel makes it with the entry.
        fs::create_dir_all(entry.join("auth")).unwrap();
        let account = ("quorate".to_owned(), "it's $HOME; rm -rf".to_owned());
        let mut lio = Lio::new(1, Vec::new()).with_account(Some(account.clone()));
        lio.root = dir.path().to_str().unwrap().to_owned();
        lio.allow(&[target], "iqn.h1", soon()).await.unwrap();
        let read = |what| fs::read_to_string(entry.join("auth").join(what)).unwrap();
        assert_eq!((read("userid"), read("password")), account);
    }

    /// Folders and links as configfs has them.
    #[tokio::test]
    async fn entries_come_and_go_and_an_open_group_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let targets = vec![
            "iqn.2026-01.com.example:a".to_owned(),
            "iqn.2026-01.com.example:gone".to_owned(),
        ];
        let group = dir.path().join(&targets[0]).join("tpgt_1");
        fs::create_dir_all(group.join("acls")).unwrap();
        fs::create_dir_all(group.join("lun/lun_0")).unwrap();
        fs::create_dir_all(group.join("attrib")).unwrap();
        let mut lio = Lio::new(0, Vec::new());
        lio.root = dir.path().to_str().unwrap().to_owned();
        let (one, h1) = (&targets[..1], "iqn.2026-01.local.quorate:c.h1");
        lio.allow(one, h1, soon()).await.unwrap();
        lio.allow(one, h1, soon()).await.unwrap();
        let link = group.join("acls").join(h1).join("lun_0/quorate");
        assert_eq!(fs::read_link(&link).unwrap(), group.join("lun/lun_0"));
        assert_eq!(
            lio.allowed(&targets, h1, soon()).await.unwrap(),
            [true, false]
        );
        let missing = lio.allow(&targets, h1, soon()).await.unwrap();
        assert_eq!(missing, targets[1..]);
        for answer in lio.cut(&targets, h1, soon()).await {
            answer.unwrap();
        }
        assert!(!group.join("acls").join(h1).exists());
        fs::write(group.join("attrib/generate_node_acls"), "1\n").unwrap();
        let open = lio.cut(one, h1, soon()).await.remove(0).unwrap_err();
        assert!(open.to_string().contains("generate_node_acls"), "{open}");
    }
}
