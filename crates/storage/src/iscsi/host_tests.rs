//! The host's initiator against folders as the kernel, udev and open-iscsi have them.

use super::*;
use std::sync::Mutex as Plain;

const TARGET: &str = "iqn.2026-01.com.example:san:db";
const US: &str = "iqn.2026-01.local.quorate:c.h1";
const PORTAL: &str = "10.0.0.5:3260";
const INTERFACE: &str = "quorate-san";

/// An `iscsiadm` that makes records and, at a login, a session with these units.
#[derive(Debug)]
struct FakeTool {
    root: PathBuf,
    luns: Vec<u32>,
    /// Units that are found only at a rescan.
    late: Vec<u32>,
    login_code: i32,
    calls: Plain<Vec<String>>,
}

impl FakeTool {
    fn session(&self, number: u32, target: &str, initiator: &str, state: &str) {
        let session = self
            .root
            .join(format!("sys/class/iscsi_session/session{number}"));
        fs::create_dir_all(session.join("device")).unwrap();
        for (what, value) in [
            ("targetname", target),
            ("initiatorname", initiator),
            ("state", state),
        ] {
            fs::write(session.join(what), format!("{value}\n")).unwrap();
        }
    }

    fn unit(&self, number: u32, lun: u32, disk: &str) {
        let session = format!("sys/class/iscsi_session/session{number}");
        let unit = format!("device/target{number}:0:0/{number}:0:0:{lun}/block/{disk}");
        fs::create_dir_all(self.root.join(session).join(unit)).unwrap();
    }

    fn record(&self) -> PathBuf {
        let nodes = self.root.join("etc/nodes").join(TARGET);
        nodes.join("10.0.0.5,3260,1").join(INTERFACE)
    }
}

#[async_trait::async_trait]
impl Tool for FakeTool {
    async fn run(&self, words: &[&str], _: Instant) -> io::Result<(i32, String)> {
        self.calls.lock().unwrap().push(words.join(" "));
        match words {
            ["-m", "iface", _, name, "-o", "update", .., value] => {
                let folder = self.root.join("etc/ifaces");
                fs::create_dir_all(&folder)?;
                let text = format!("iface.initiatorname = {value}\n");
                fs::write(folder.join(name), text)?;
            }
            ["-m", "node", .., "-o", "new"] => {
                fs::create_dir_all(self.record().parent().unwrap())?;
                let text = "# BEGIN RECORD 2.1.8\nnode.name = x\nnode.startup = automatic\n\
                    node.session.auth.authmethod = None\n# END RECORD\n";
                fs::write(self.record(), text)?;
            }
            ["-m", "node", .., "--login"] if self.login_code == 0 => {
                self.session(1, TARGET, US, "LOGGED_IN");
                for lun in &self.luns {
                    self.unit(1, *lun, &format!("sd{}", (b'b' + *lun as u8) as char));
                }
            }
            ["-m", "node", .., "--login"] => return Ok((self.login_code, "no".into())),
            ["-m", "session", "-r", "1", "--rescan"] => {
                self.late.iter().for_each(|lun| self.unit(1, *lun, "sdz"));
            }
            _ => {}
        }
        Ok((0, String::new()))
    }

    fn is_installed(&self) -> bool {
        true
    }
}

struct Host {
    dir: tempfile::TempDir,
    tool: Arc<FakeTool>,
    initiator: HostInitiator,
}

impl Host {
    fn new(change: impl FnOnce(&mut FakeTool)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let mut tool = FakeTool {
            root: root.clone(),
            luns: vec![0, 1],
            late: Vec::new(),
            login_code: 0,
            calls: Plain::default(),
        };
        change(&mut tool);
        let tool = Arc::new(tool);
        let places = Places {
            sys: root.join("sys"),
            dev: root.join("dev"),
            records: vec![root.join("none"), root.join("etc")],
            udev: root.join("udev"),
            login_within: LOGIN_WITHIN,
        };
        let login = Login {
            user: "quorate".into(),
            password: "s3cret = #x".into(),
        };
        let seen = Arc::clone(&tool) as Arc<dyn Tool>;
        let initiator = HostInitiator::new("san", US, Some(login), places, seen);
        Self {
            dir,
            tool,
            initiator,
        }
    }

    fn dev(&self, name: &str) -> PathBuf {
        self.dir.path().join("dev").join(name)
    }

    async fn attach(&self, lun: u32) -> Result<PathBuf, PoolError> {
        self.initiator.attach(&unit(lun), (PORTAL, 1)).await
    }

    fn calls(&self) -> Vec<String> {
        self.tool.calls.lock().unwrap().clone()
    }
}

fn unit(lun: u32) -> Lun {
    Lun {
        target: TARGET.into(),
        lun,
    }
}

#[tokio::test]
async fn a_host_logs_in_once_under_its_own_name_and_finds_its_units() {
    let host = Host::new(|_| {});
    assert_eq!(host.initiator.attached(&unit(1)), None);
    assert_eq!(host.attach(1).await.unwrap(), host.dev("sdc"));
    let node = format!("-m node -T {TARGET} -p {PORTAL},1 -I {INTERFACE}");
    let wanted = [
        format!("-m iface -I {INTERFACE} -o new"),
        format!("-m iface -I {INTERFACE} -o update -n iface.initiatorname -v {US}"),
        format!("{node} -o new"),
        format!("{node} --login"),
    ];
    assert_eq!(host.calls(), wanted);
    assert_eq!(host.attach(0).await.unwrap(), host.dev("sdb"));
    assert_eq!(host.initiator.attached(&unit(0)), Some(host.dev("sdb")));
    assert_eq!(host.calls().len(), wanted.len(), "it is logged in");
}

#[tokio::test]
async fn the_password_is_in_the_record_and_in_no_argument() {
    let host = Host::new(|_| {});
    host.attach(0).await.unwrap();
    let record = fs::read_to_string(host.tool.record()).unwrap();
    let wanted = "# BEGIN RECORD 2.1.8\nnode.name = x\nnode.session.auth.authmethod = CHAP\n\
        node.session.auth.username = quorate\nnode.session.auth.password = s3cret = #x\nnode.startup = manual\n# END RECORD\n";
    assert_eq!(record, wanted);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::metadata(host.tool.record())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(host.calls().iter().all(|call| !call.contains("s3cret")));
}

#[tokio::test]
async fn sessions_of_others_and_broken_ones_are_not_ours() {
    let host = Host::new(|_| {});
    let other = "iqn.1993-08.org.debian:01:abc";
    host.tool.session(7, TARGET, other, "LOGGED_IN");
    host.tool.unit(7, 0, "sdx");
    host.tool
        .session(8, "iqn.2026-01.com.example:san:other", US, "LOGGED_IN");
    host.tool.unit(8, 0, "sdy");
    host.tool.session(9, TARGET, US, "FAILED");
    host.tool.unit(9, 0, "sdw");
    assert_eq!(host.initiator.attached(&unit(0)), None);
    assert_eq!(host.attach(0).await.unwrap(), host.dev("sdb"));
}

#[tokio::test]
async fn a_unit_that_was_mapped_later_is_looked_for() {
    let host = Host::new(|tool| (tool.luns, tool.late) = (vec![0], vec![3 | FLAT_SPACE]));
    assert_eq!(host.attach(3).await.unwrap(), host.dev("sdz"));
    let rescans = host.calls();
    let rescans = rescans.iter().filter(|call| call.contains("--rescan"));
    assert_eq!(rescans.count(), 1);
}

#[tokio::test]
async fn a_unit_that_is_not_there_is_said() {
    let mut host = Host::new(|_| {});
    host.initiator.places.login_within = Duration::from_millis(300);
    let error = host.attach(9).await.unwrap_err().to_string();
    assert!(error.contains("has no LUN 9"), "{error}");
    assert!(error.contains(US), "{error}");
}

#[tokio::test]
async fn stable_names_are_preferred_where_there_are_any() {
    let host = Host::new(|_| {});
    let by_path = host.dev("disk/by-path");
    fs::create_dir_all(&by_path).unwrap();
    let link = |lun: u32, disk: &str| {
        let name = by_path.join(format!("ip-{PORTAL}-iscsi-{TARGET}-lun-{lun}"));
        std::os::unix::fs::symlink(format!("../../{disk}"), &name).unwrap();
        name
    };
    let stable = link(1, "sdc");
    assert_eq!(host.attach(1).await.unwrap(), stable);
    // A map of several paths has the disk.
    let block = host.dir.path().join("sys/block");
    fs::create_dir_all(block.join("sdc/holders/dm-0")).unwrap();
    fs::create_dir_all(block.join("dm-0/dm")).unwrap();
    fs::write(block.join("dm-0/dm/uuid"), "mpath-3600\n").unwrap();
    fs::write(block.join("dm-0/dm/name"), "mpatha\n").unwrap();
    assert_eq!(host.attach(1).await.unwrap(), host.dev("mapper/mpatha"));
}

#[tokio::test]
async fn what_iscsiadm_says_is_explained() {
    for (code, part) in [
        (24, "check `chap.user`"),
        (20, "systemctl enable --now iscsid.socket"),
        (12, "modprobe iscsi_tcp"),
        (8, "the portal does not answer"),
    ] {
        let host = Host::new(|tool| tool.login_code = code);
        let error = host.attach(0).await.unwrap_err().to_string();
        assert!(
            error.contains(part) && error.contains(US),
            "{code}: {error}"
        );
    }
}

#[tokio::test]
async fn a_host_without_open_iscsi_is_told_what_to_install() {
    #[derive(Debug)]
    struct Missing;
    #[async_trait::async_trait]
    impl Tool for Missing {
        async fn run(&self, _: &[&str], _: Instant) -> io::Result<(i32, String)> {
            Err(io::ErrorKind::NotFound.into())
        }
        fn is_installed(&self) -> bool {
            false
        }
    }
    let mut host = Host::new(|_| {});
    assert!(host.initiator.check().is_ok());
    host.initiator.tool = Arc::new(Missing);
    for error in [
        host.attach(0).await.unwrap_err(),
        host.initiator.check().unwrap_err(),
    ] {
        assert!(error.to_string().contains("install open-iscsi"), "{error}");
    }
}
