//! Ceph: a host's address on the block list of the OSDs.
//!
//! A client whose address is listed gets no answer from any OSD from the moment that the OSD has the map with the entry;
//! `ceph osd blocklist add` returns when the monitors have committed it, and a watcher that is gone from an image was
//! told by the image's OSD. The entry is for the whole address (`ADDRESS:0/0`), so it holds for every process of the
//! host, and it lasts until it is taken back: an entry that expires would let a forgotten host write again.

use super::{AccessRemoved, TargetAccess, TargetError, all, call, millis};
use serde::Deserialize;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// Ten years, in seconds: entries without a time last an hour.
const FOREVER_S: &str = "315360000";
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A Ceph cluster. Targets are images as `POOL/IMAGE`, initiators addresses of hosts.
#[derive(Clone)]
pub struct Ceph {
    /// Its configuration.
    pub conf: String,
    /// User, without `client.`.
    pub user: String,
    /// The user's key; absent: the keyring has it.
    pub key: Option<String>,
    /// Programs `ceph` and `rbd`.
    pub programs: [String; 2],
}

impl std::fmt::Debug for Ceph {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ceph")
            .field("conf", &self.conf)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Listed {
    addr: String,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    watchers: Vec<Watcher>,
}

#[derive(Deserialize)]
struct Watcher {
    address: String,
}

impl Ceph {
    /// The cluster of this configuration.
    #[must_use]
    pub fn new(conf: &str, user: &str, key: Option<String>) -> Self {
        Self {
            conf: conf.to_owned(),
            user: user.to_owned(),
            key,
            programs: ["ceph".to_owned(), "rbd".to_owned()],
        }
    }

    async fn run(
        &self,
        program: usize,
        words: &[&str],
        deadline: Instant,
    ) -> Result<String, TargetError> {
        let mut all = vec![self.programs[program].clone()];
        all.extend(["--conf", &self.conf, "--id", &self.user].map(str::to_owned));
        if self.key.is_some() {
            // Not an argument: everybody can see those.
            all.extend(["--keyfile", "/dev/stdin"].map(str::to_owned));
        }
        all.extend(words.iter().map(ToString::to_string));
        let secrets: Vec<&str> = self.key.as_deref().into_iter().collect();
        call(
            &all,
            self.key.clone().unwrap_or_default(),
            &secrets,
            deadline,
        )
        .await
    }

    async fn listed(&self, address: IpAddr, deadline: Instant) -> Result<bool, TargetError> {
        let text = self
            .run(0, &["osd", "blocklist", "ls", "--format", "json"], deadline)
            .await?;
        let entries: Vec<Listed> = parse("ceph", &text)?;
        Ok(entries.iter().any(|entry| entry.addr == whole(address)))
    }

    async fn watches(
        &self,
        image: &str,
        address: IpAddr,
        deadline: Instant,
    ) -> Result<bool, TargetError> {
        let text = self
            .run(1, &["status", "--format", "json", image], deadline)
            .await?;
        let status: Status = parse("rbd", &text)?;
        Ok(status
            .watchers
            .iter()
            .any(|watcher| ip_of(&watcher.address) == Some(address)))
    }

    /// Waits until the image has no watcher at the address.
    async fn abandoned(
        &self,
        image: &str,
        address: IpAddr,
        deadline: Instant,
    ) -> Result<(), TargetError> {
        let mut seen = false;
        loop {
            match self.watches(image, address, deadline).await {
                Ok(false) => return Ok(()),
                Err(error) if !seen => return Err(error),
                watching => seen |= watching.is_ok(),
            }
            if Instant::now() + LOOK_AGAIN >= deadline {
                return Err(TargetError::StillOpen {
                    target: image.to_owned(),
                    initiator: address.to_string(),
                    detail: "the image still has a watcher there".to_owned(),
                });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn list(&self, address: IpAddr, deadline: Instant) -> Result<(), TargetError> {
        self.run(
            0,
            &["osd", "blocklist", "add", &whole(address), FOREVER_S],
            deadline,
        )
        .await?;
        if self.listed(address, deadline).await? {
            return Ok(());
        }
        Err(TargetError::StillOpen {
            target: "the block list".to_owned(),
            initiator: address.to_string(),
            detail: "it is not on the list after it was put there".to_owned(),
        })
    }
}

fn whole(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}:0/0"),
        IpAddr::V6(address) => format!("[{address}]:0/0"),
    }
}

/// The address of `10.0.0.1:0/123` or `[fd00::1]:0/123`.
fn ip_of(client: &str) -> Option<IpAddr> {
    let socket = client.split('/').next()?;
    socket
        .parse::<std::net::SocketAddr>()
        .ok()
        .map(|socket| socket.ip())
}

fn parse<T: for<'d> Deserialize<'d>>(program: &str, text: &str) -> Result<T, TargetError> {
    serde_json::from_str(text).map_err(|error| TargetError::Answer {
        program: program.to_owned(),
        detail: error.to_string(),
    })
}

fn address(initiator: &str) -> Result<IpAddr, TargetError> {
    initiator.parse().map_err(|_| TargetError::Answer {
        program: "the cluster".to_owned(),
        detail: format!("`{initiator}` is not the address of a host"),
    })
}

#[async_trait::async_trait]
impl TargetAccess for Ceph {
    async fn cut(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Vec<Result<AccessRemoved, TargetError>> {
        let begun = Instant::now();
        let address = match address(initiator) {
            Ok(address) => address,
            Err(error) => return all(targets, &error),
        };
        if let Err(error) = self.list(address, deadline).await {
            return all(targets, &error);
        }
        let one = |target: &String| {
            let target = target.clone();
            async move {
                self.abandoned(&target, address, deadline).await?;
                Ok(AccessRemoved {
                    target,
                    how: format!(
                        "Ceph put {address} on its block list; the image has no watcher there"
                    ),
                    took_ms: millis(begun.elapsed()),
                })
            }
        };
        futures_util::future::join_all(targets.iter().map(one)).await
    }

    async fn allow(
        &self,
        _: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError> {
        let address = address(initiator)?;
        if self.listed(address, deadline).await? {
            self.run(0, &["osd", "blocklist", "rm", &whole(address)], deadline)
                .await?;
        }
        Ok(Vec::new())
    }

    async fn allowed(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<bool>, TargetError> {
        let listed = self.listed(address(initiator)?, deadline).await?;
        Ok(targets.iter().map(|_| !listed).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// Programs that keep the list in a file, and one watcher of `p/busy`.
    fn programs(dir: &Path, honest: bool) -> Ceph {
        let list = dir.join("list");
        std::fs::write(&list, "").unwrap();
        let add = if honest { "echo \"$8\" >> LIST" } else { ":" };
        let ceph = format!(
            "#!/bin/sh\ncat > DIR/stdin\necho \"$@\" >> DIR/args\ncase \"$7 $8 $9\" in\n'osd blocklist add') shift; shift; {add};;\n'osd blocklist rm') : > LIST;;\n'osd blocklist ls') printf '['; sep=; while read a; do printf '%s{{\"addr\":\"%s\",\"until\":\"x\"}}' \"$sep\" \"$a\"; sep=,; done < LIST; printf ']';;\nesac\n"
        );
        let rbd = "#!/bin/sh\ncat > /dev/null\ncase \"$*\" in *p/busy) echo '{\"watchers\":[{\"address\":\"10.0.0.1:0/77\"}]}';; *) echo '{}';; esac\n";
        let mut paths = Vec::new();
        for (name, text) in [("ceph", ceph.as_str()), ("rbd", rbd)] {
            let text = text
                .replace("LIST", list.to_str().unwrap())
                .replace("DIR", dir.to_str().unwrap());
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
            paths.push(path.to_str().unwrap().to_owned());
        }
        let mut ceph = Ceph::new("/etc/ceph/ceph.conf", "quorate", Some("hush".to_owned()));
        ceph.programs = [paths.remove(0), paths.remove(0)];
        ceph
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test]
    async fn an_address_is_listed_looked_for_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let ceph = programs(dir.path(), true);
        let free = ["p/free".to_owned()];
        assert_eq!(
            ceph.allowed(&free, "10.0.0.1", soon()).await.unwrap(),
            [true]
        );
        let cut = ceph.cut(&free, "10.0.0.1", soon()).await.remove(0).unwrap();
        assert!(cut.how.contains("block list"), "{cut:?}");
        assert_eq!(
            ceph.allowed(&free, "10.0.0.1", soon()).await.unwrap(),
            [false]
        );
        ceph.allow(&free, "10.0.0.1", soon()).await.unwrap();
        assert_eq!(
            ceph.allowed(&free, "10.0.0.1", soon()).await.unwrap(),
            [true]
        );
        let words = std::fs::read_to_string(dir.path().join("args")).unwrap();
        assert!(!words.contains("hush"), "{words}");
        assert_eq!(
            std::fs::read_to_string(dir.path().join("stdin")).unwrap(),
            "hush"
        );
    }

    #[tokio::test]
    async fn a_watcher_that_stays_or_a_list_that_forgets_is_no_proof() {
        let dir = tempfile::tempdir().unwrap();
        let ceph = programs(dir.path(), true);
        let deadline = Instant::now() + Duration::from_millis(1500);
        let busy = ceph
            .cut(&["p/busy".to_owned()], "10.0.0.1", deadline)
            .await
            .remove(0);
        assert!(busy.unwrap_err().to_string().contains("watcher"));
        let ceph = programs(dir.path(), false);
        let gone = ceph
            .cut(&["p/free".to_owned()], "10.0.0.1", soon())
            .await
            .remove(0);
        assert!(gone.unwrap_err().to_string().contains("not on the list"));
        let name = ceph
            .cut(&["p/free".to_owned()], "h1", soon())
            .await
            .remove(0);
        assert!(name.unwrap_err().to_string().contains("not the address"));
    }

    #[test]
    fn client_addresses_are_read() {
        assert_eq!(ip_of("10.0.0.1:0/77"), "10.0.0.1".parse().ok());
        assert_eq!(ip_of("[fd00::1]:0/77"), "fd00::1".parse().ok());
        assert_eq!(ip_of("nonsense"), None);
    }
}
