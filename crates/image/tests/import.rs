//! Imports, exports and copies with the real tools of QEMU, in a pool that is a directory.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Lab, content, import, qemu_img, sha256, task};
use quorate_image::ImageUser;
use quorate_storage::DiskFormat;
use quorate_types::{ImageJob, ImageTask, JobState};
use serde_json::json;
use std::fs;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

fn done(job: ImageJob) -> ImageJob {
    assert_eq!(job.state, JobState::Done, "{job:?}");
    job
}

fn failed(job: &ImageJob) -> &str {
    assert_eq!(job.state, JobState::Failed, "{job:?}");
    job.error.as_deref().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_comes_in_and_goes_out_with_the_same_content() {
    let lab = Lab::new().await;
    let raw = lab.path("disk.raw");
    fs::write(&raw, content(7 * MIB + 512)).unwrap();
    let sum = sha256(&raw);
    let raw_name = raw.to_str().unwrap();
    for (format, to) in [
        ("raw", "raw"),
        ("qcow2", "qcow2"),
        ("vmdk", "raw"),
        ("vhdx", "qcow2"),
        ("vdi", "raw"),
        ("vpc", "raw"),
    ] {
        let file = lab.path(&format!("disk.{format}"));
        let exact = format!("disk-{format}");
        if format != "raw" {
            let mut words = vec!["convert", "-f", "raw", "-O", format];
            if format == "vpc" {
                words.extend(["-o", "force_size=on"]);
            }
            words.extend([raw_name, file.to_str().unwrap()]);
            qemu_img(&words);
        }
        let imported = done(
            lab.run(task(json!({
                "op": "import", "file": file, "to": format!("shared/{exact}"), "format": to,
            })))
            .await,
        );
        // VHDX counts in MiB and more; the rest is zeroes.
        let whole = format == "vhdx";
        assert!(
            whole || imported.sha256.as_deref() == Some(&sum),
            "{format}"
        );
        let image = lab.pool(&exact);
        let compared = qemu_img(&[
            "compare",
            "-f",
            "raw",
            "-F",
            to,
            raw_name,
            image.to_str().unwrap(),
        ]);
        assert!(compared.contains("identical"), "{format}: {compared}");
    }
    for format in ["raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc"] {
        let out = lab.path(&format!("out.{format}"));
        let job = lab.run(task(json!({
            "op": "export", "from": "shared/disk-qcow2", "file": out, "format": format,
        })));
        let job = done(job.await);
        assert_eq!(job.sha256.as_deref(), Some(&*sum), "{format}");
        let words = [
            "compare",
            "-f",
            "raw",
            "-F",
            format,
            raw_name,
            out.to_str().unwrap(),
        ];
        assert!(qemu_img(&words).contains("identical"), "{format}");
    }
    let job = done(
        lab.run(task(
            json!({ "op": "clone", "from": "shared/disk-raw", "to": "shared/copies/1" }),
        ))
        .await,
    );
    assert_eq!(job.sha256.as_deref(), Some(&*sum));
    assert_eq!(sha256(&lab.pool("copies/1")), sum);
    // Holes stay holes.
    let blocks =
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(lab.pool("copies/1")).unwrap());
    assert!(blocks * 512 < 6 * MIB as u64, "{blocks}");
    assert!(lab.tidy());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_whole_or_not_alone_is_refused() {
    let lab = Lab::new().await;
    let raw = lab.path("disk.raw");
    fs::write(&raw, content(6 * MIB)).unwrap();
    let name = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let refused = async |file: &std::path::Path| {
        let job = lab.run(import(file, "shared/new")).await;
        let text = failed(&job).to_owned();
        assert!(!lab.pool("new").exists() && lab.tidy(), "{text}");
        text
    };
    // Cut off in the middle.
    for format in ["qcow2", "vmdk", "vhdx", "vdi", "vpc"] {
        let file = lab.path(&format!("cut.{format}"));
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            format,
            &name(&raw),
            &name(&file),
        ]);
        let length = fs::metadata(&file).unwrap().len();
        let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
        open.set_len(length * 2 / 3).unwrap();
        let text = refused(&file).await;
        assert!(
            text.contains("cut off") || text.contains("damaged"),
            "{format}: {text}"
        );
    }
    fs::write(lab.path("odd"), [1; 700]).unwrap();
    assert!(
        refused(&lab.path("odd"))
            .await
            .contains("whole number of sectors")
    );
    fs::write(lab.path("empty"), []).unwrap();
    assert!(refused(&lab.path("empty")).await.contains("empty"));
    assert!(
        refused(&lab.path("missing"))
            .await
            .contains("cannot be read")
    );
    assert!(refused(lab.dir.path()).await.contains("no file"));
    // A partition table of a larger disk.
    let mut disk = content(6 * MIB);
    disk[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].fill(0);
    let table = lab.path("table");
    fs::write(&table, &disk).unwrap();
    assert!(
        refused(&table)
            .await
            .contains("partition table of the source needs 34603008 bytes")
    );
    let forced = json!({ "op": "import", "file": table, "to": "shared/forced", "force": true });
    done(lab.run(task(forced)).await);
    // Files beside it: nothing of them is read.
    let overlay = lab.path("overlay.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &name(&raw),
        &name(&overlay),
    ]);
    assert!(refused(&overlay).await.contains("based on another file"));
    let external = lab.path("external.qcow2");
    let option = format!("data_file={}", name(&lab.path("data")));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &option,
        &name(&external),
        "1M",
    ]);
    assert!(refused(&external).await.contains("another file"));
    let secret = lab.path("secret");
    fs::write(&secret, [7; 1024]).unwrap();
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n\
         RW 2 FLAT \"{}\" 0\n\nddb.adapterType = \"ide\"\n",
        "../".repeat(12) + secret.to_str().unwrap().trim_start_matches('/')
    );
    let folder = lab.path("vm");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("evil.vmdk"), text).unwrap();
    assert!(
        refused(&folder.join("evil.vmdk"))
            .await
            .contains("not beside it")
    );
    let packed = lab.path("disk.gz");
    fs::write(&packed, [0x1f, 0x8b, 8, 0, 0, 0]).unwrap();
    assert!(refused(&packed).await.contains("unpack it first"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_goes_on_where_it_was_killed() {
    let mut lab = Lab::new().await;
    let raw = lab.path("disk.raw");
    let disk = content(160 * MIB);
    fs::write(&raw, &disk).unwrap();
    for format in ["raw", "qcow2"] {
        let to = format!("shared/big-{format}");
        let slow = task(json!({
            "op": "import", "file": raw, "to": to, "format": format, "limit": "64MiB",
        }));
        // A daemon of its own, to be killed.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        let jobs = {
            let _inside = handle.enter();
            lab.restart();
            lab.jobs.clone()
        };
        let id = {
            let _inside = handle.enter();
            jobs.submit("test", slow.clone()).unwrap().id
        };
        let record = lab.path("jobs").join(format!("{id}.json"));
        let marked = || -> u64 {
            let text = fs::read(&record).unwrap_or_default();
            let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
            value["marked"].as_u64().unwrap_or(0)
        };
        let deadline = Instant::now() + common::SOON;
        while marked() == 0 {
            assert!(Instant::now() < deadline, "{:?}", jobs.get(&id));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Everything of it stops at once, as by a kill.
        runtime.shutdown_background();
        assert!(
            !lab.pool(&format!("big-{format}")).exists(),
            "half made and visible"
        );
        assert!(!lab.tidy(), "nothing is left to go on with");
        lab.restart();
        let job = done(lab.end(&id).await);
        assert!(job.resumed_at >= 64 * MIB as u64, "{job:?}");
        assert_eq!(job.sha256, Some(sha256(&raw)));
        assert!(lab.tidy());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_taken_back_and_leaves_nothing() {
    let lab = Lab::new().await;
    let raw = lab.path("disk.raw");
    fs::write(&raw, content(40 * MIB)).unwrap();
    let slow = json!({ "op": "import", "file": raw, "to": "shared/new", "limit": "4MiB" });
    let job = lab.jobs.submit("test", task(slow.clone())).unwrap();
    // The same again is the same job; another one on the same image is refused.
    assert_eq!(lab.jobs.submit("test", task(slow)).unwrap().id, job.id);
    let other = lab.jobs.submit(
        "test",
        task(json!({ "op": "delete", "image": "shared/new" })),
    );
    assert!(other.unwrap_err().to_string().contains(&job.id));
    let deadline = Instant::now() + common::SOON;
    while lab.jobs.get(&job.id).unwrap().done == 0 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    lab.jobs.cancel(&job.id).await.unwrap();
    let job = lab.end(&job.id).await;
    assert_eq!(job.state, JobState::Cancelled);
    assert!(!job.resumable && lab.tidy() && !lab.pool("new").exists());
    assert!(lab.jobs.cancel("h1-nothing").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_grow_and_go_unless_somebody_uses_them() {
    let lab = Lab::new().await;
    let raw = lab.path("disk.raw");
    fs::write(&raw, content(2 * MIB)).unwrap();
    let big = json!({ "op": "import", "file": raw, "to": "shared/db", "size": "8MiB", "format": "qcow2" });
    done(lab.run(task(big)).await);
    let small = json!({ "op": "import", "file": raw, "to": "shared/small", "size": "1MiB" });
    assert!(failed(&lab.run(task(small)).await).contains("never made smaller"));
    assert!(failed(&lab.run(import(&raw, "shared/db")).await).contains("already"));
    let resize = |size: &str| task(json!({ "op": "resize", "image": "shared/db", "size": size }));
    done(lab.run(resize("16MiB")).await);
    assert!(failed(&lab.run(resize("4MiB")).await).contains("never made smaller"));
    // Stopped, then running.
    let image = "shared/db".parse().unwrap();
    let mut user = ImageUser {
        vm: "db".parse().unwrap(),
        host: None,
        format: DiskFormat::Qcow2,
    };
    let set = |user: &ImageUser| {
        let mut users = lab.host.users.lock().unwrap();
        users.insert("shared/db".parse().unwrap(), user.clone());
    };
    set(&user);
    let snap = |op: &str, name: &str| task(json!({ "op": op, "image": "shared/db", "name": name }));
    done(lab.run(snap("snapshot_create", "before")).await);
    assert!(failed(&lab.run(snap("snapshot_create", "before")).await).contains("already"));
    assert!(failed(&lab.run(snap("snapshot_revert", "nothing")).await).contains("no snapshot"));
    assert!(failed(&lab.run(snap("snapshot_create", "a b")).await).contains("cannot name"));
    let listed = quorate_image::list_snapshots(&*lab.host, &image)
        .await
        .unwrap();
    assert_eq!(listed[0].name, "before");
    done(lab.run(snap("snapshot_revert", "before")).await);
    user.host = Some("h1".parse().unwrap());
    set(&user);
    assert!(failed(&lab.run(snap("snapshot_revert", "before")).await).contains("stop it"));
    let job = done(lab.run(snap("snapshot_create", "live")).await);
    assert_eq!(job.notes, ["the guest was quiesced"]);
    done(lab.run(resize("32MiB")).await);
    let told = lab.host.told.lock().unwrap().clone();
    assert_eq!(
        told,
        [
            "snapshot db shared/db live true",
            "resize db shared/db 33554432"
        ]
    );
    let copy = task(json!({ "op": "clone", "from": "shared/db", "to": "shared/copy" }));
    assert!(failed(&lab.run(copy).await).contains("needs it stopped"));
    let delete = ImageTask::Delete { image };
    assert!(failed(&lab.run(delete.clone()).await).contains("is a disk of VM db"));
    lab.host.users.lock().unwrap().clear();
    done(lab.run(delete.clone()).await);
    assert!(failed(&lab.run(delete).await).contains("there is no image"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_leads_out_of_the_pool_is_refused() {
    let lab = Lab::new().await;
    let outside = lab.path("outside.raw");
    fs::write(&outside, content(MIB)).unwrap();
    let name = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let create = |base: String, format: &str, image: &str| {
        let image = name(lab.pool(image));
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-F", format, "-b", &base, &image,
        ]);
    };
    create(name(outside), "raw", "middle");
    create(name(lab.pool("middle")), "qcow2", "top");
    for image in ["middle", "top"] {
        let job = lab.run(task(json!({
            "op": "clone", "from": format!("shared/{image}"), "to": "shared/copy",
        })));
        let job = job.await;
        assert!(failed(&job).contains("outside"), "{image}: {job:?}");
    }
}
