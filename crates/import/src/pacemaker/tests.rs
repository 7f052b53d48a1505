//! Tests of the reader, the planner and the converter of CIBs.

use super::*;
use crate::Problems;
use std::collections::BTreeMap;

const NOW: i64 = 1_700_000_000;

/// A CIB of the hosts h1, h2 and h3, all up, without fencing.
fn cib_with(resources: &str, constraints: &str, histories: [&str; 3]) -> String {
    let mut nodes = String::new();
    let mut states = String::new();
    for (number, history) in histories.iter().enumerate() {
        let id = number + 1;
        nodes.push_str(&format!("<node id=\"{id}\" uname=\"h{id}\"/>\n"));
        states.push_str(&format!(
            "<node_state id=\"{id}\" uname=\"h{id}\" in_ccm=\"true\" crmd=\"online\" join=\"member\" expected=\"member\"><lrm id=\"{id}\"><lrm_resources>{history}</lrm_resources></lrm></node_state>\n"
        ));
    }
    format!(
        "<cib have-quorum=\"1\"><configuration><crm_config><cluster_property_set id=\"o\"><nvpair id=\"o1\" name=\"stonith-enabled\" value=\"false\"/></cluster_property_set></crm_config>\n<nodes>{nodes}</nodes>\n<resources>{resources}</resources>\n<constraints>{constraints}</constraints></configuration>\n<status>{states}</status></cib>"
    )
}

fn vm(id: &str, meta: &[(&str, &str)]) -> String {
    let pairs = meta.iter().map(|(name, value)| {
        format!("<nvpair id=\"{id}-{name}\" name=\"{name}\" value=\"{value}\"/>")
    });
    let pairs: String = pairs.collect();
    format!(
        "<primitive id=\"{id}\" class=\"ocf\" provider=\"heartbeat\" type=\"VirtualDomain\"><meta_attributes id=\"{id}-meta\">{pairs}</meta_attributes></primitive>\n"
    )
}

/// An operation that ended with a code where another was expected.
fn event(id: &str, task: &str, interval: u32, call: u32, code: u32, expected: u32) -> String {
    format!(
        "<lrm_rsc_op id=\"{id}_{task}_{interval}_{call}\" operation_key=\"{id}_{task}_{interval}\" operation=\"{task}\" interval=\"{interval}\" call-id=\"{call}\" rc-code=\"{code}\" op-status=\"0\" transition-key=\"1:1:{expected}:x\"/>"
    )
}

fn history(id: &str, events: &str) -> String {
    format!("<lrm_resource id=\"{id}\">{events}</lrm_resource>")
}

fn runs(id: &str) -> String {
    history(id, &event(id, "start", 0, 2, 0, 0))
}

fn planned(text: &str) -> Planned {
    plan(&read(text, "cib.xml").unwrap(), NOW)
}

/// `migrate db h1 -> h2`, one a line.
fn deeds(planned: &Planned) -> Vec<String> {
    let deed = |action: &Action| {
        let mut words = vec![action.action.to_owned()];
        words.extend(action.resource.clone());
        words.extend(action.from.clone());
        words.extend(action.to.as_ref().map(|to| format!("-> {to}")));
        words.join(" ")
    };
    planned.actions.iter().map(deed).collect()
}

fn refused(text: &str) -> Problems {
    read(text, "cib.xml").unwrap_err()
}

#[test]
fn problems_say_where_and_what_to_do() {
    let text = cib_with(
        &vm("a", &[]),
        "\n  <rsc_colocation id=\"c\" rsc=\"a\" with-rsc=\"a\" score=\"NaN\"/>",
        ["", "", ""],
    );
    let problems = refused(&text).to_string();
    let line = text.lines().position(|line| line.contains("NaN")).unwrap() + 1;
    let expected = format!("cib.xml:{line}:3: score=\"NaN\" of <rsc_colocation> is no score");
    assert!(problems.starts_with(&expected), "{problems}");
    assert!(problems.contains("help: "), "{problems}");
}

#[test]
fn what_is_no_cib_is_refused_with_its_place() {
    for (text, place, words) in [
        ("", (1, 1), "not well-formed"),
        ("<cib>\n <configuration>", (2, 17), "not well-formed"),
        (
            "<cib>\n <a b=\"1\" b=\"2\"/></cib>",
            (2, 11),
            "not well-formed",
        ),
        ("<html/>", (1, 1), "<cib> is expected"),
        ("<cib/>", (1, 1), "no <configuration>"),
        ("<cib>&boom;</cib>", (1, 6), "not well-formed"),
        (
            "<?xml version=\"1.0\"?>\n<!DOCTYPE cib [<!ENTITY a \"b\">]>\n<cib/>",
            (2, 1),
            "document type",
        ),
        (
            "<cib><configuration><resources><primitive/></resources></configuration></cib>",
            (1, 32),
            "without an id",
        ),
        (
            "<cib><configuration><resources><primitive id=\"a\" template=\"t\"/></resources></configuration></cib>",
            (1, 32),
            "no template",
        ),
        (
            "<cib><configuration><nodes><node id=\"1\" uname=\"a\"/><node id=\"2\" uname=\"a\"/></nodes></configuration></cib>",
            (1, 52),
            "twice",
        ),
    ] {
        let problems = refused(text);
        let first = &problems.problems[0];
        assert_eq!(
            (first.place.line, first.place.column),
            place,
            "{text}: {problems}"
        );
        assert!(first.message.contains(words), "{text}: {problems}");
    }
}

#[test]
fn bounds_hold() {
    let deep = format!("{}{}", "<a>".repeat(100), "</a>".repeat(100));
    assert!(refused(&deep).to_string().contains("deeper than 64"));
    let attributes: String = (0..500).map(|n| format!(" a{n}=\"\"")).collect();
    assert!(
        refused(&format!("<cib{attributes}/>"))
            .to_string()
            .contains("attributes")
    );
    let many = format!("<cib>{}</cib>", "<a/>".repeat(MAX_ELEMENTS + 1));
    assert!(refused(&many).to_string().contains("elements"));
    let huge = " ".repeat(MAX_BYTES + 1);
    assert!(refused(&huge).to_string().contains("too many"));
    // Quotes and comments do not confuse the count.
    let text = cib_with("<!-- <a><b> -->", "<!-- > -->", ["", "", ""]);
    assert!(read(&text, "cib.xml").is_ok());
}

#[test]
fn what_multiplies_is_bounded() {
    let refs = |from: usize| -> String {
        let members = (from..from + 800).map(|n| format!("<resource_ref id=\"vm{n}\"/>"));
        members.collect()
    };
    let resources: String = (0..1600).map(|n| vm(&format!("vm{n}"), &[])).collect();
    let sets = format!(
        "\n<rsc_order id=\"o\"><resource_set id=\"s1\" sequential=\"false\">{}</resource_set>\n<resource_set id=\"s2\" sequential=\"false\">{}</resource_set></rsc_order>",
        refs(0),
        refs(800)
    );
    let planned = planned(&cib_with(&resources, &sets, ["", "", ""]));
    assert_eq!(
        planned.contradictions.len(),
        1,
        "{:?}",
        planned.contradictions
    );
    assert!(planned.contradictions[0].message.contains("too many rules"));
    assert!(planned.contradictions[0].place.line > 1);

    let nodes: String = (0..6000)
        .map(|n| format!("<node id=\"{n}\" uname=\"n{n}\"/>"))
        .collect();
    let many: String = (0..6000)
        .map(|n| format!("<primitive id=\"p{n}\"/>"))
        .collect();
    let text = format!(
        "<cib><configuration><nodes>{nodes}</nodes><resources>{many}</resources></configuration></cib>"
    );
    assert!(
        refused(&text)
            .to_string()
            .contains("6000 resources on 6000 nodes are too many")
    );
}

#[test]
fn many_resources_are_planned_in_time() {
    let resources: String = (0..3000)
        .map(|n| vm(&format!("vm{n}"), &[("priority", "1")]))
        .collect();
    let constraints: String = (1..3000)
        .map(|n| format!("<rsc_order id=\"o{n}\" first=\"vm{}\" then=\"vm{n}\"/><rsc_colocation id=\"c{n}\" rsc=\"vm{n}\" with-rsc=\"vm{}\" score=\"-INFINITY\"/>", n - 1, n - 1))
        .collect();
    let planned = planned(&cib_with(&resources, &constraints, ["", "", ""]));
    assert_eq!(planned.placement.len(), 3000);
}

#[test]
fn a_chain_is_drained_live_and_nothing_stops() {
    let live = [("allow-migrate", "true"), ("resource-stickiness", "100")];
    let resources = ["db", "app", "web"].map(|id| vm(id, &live)).concat();
    let orders = "<rsc_order id=\"o1\" first=\"db\" then=\"app\"/><rsc_order id=\"o2\" first=\"app\" then=\"web\"/>";
    let all = ["db", "app", "web"].map(runs).concat();
    let text = cib_with(&resources, orders, [&all, "", ""]).replace(
        "uname=\"h1\"/>",
        "uname=\"h1\"><instance_attributes id=\"s\"><nvpair id=\"s1\" name=\"standby\" value=\"on\"/></instance_attributes></node>",
    );
    let planned = planned(&text);
    assert!(
        planned
            .actions
            .iter()
            .all(|action| action.action == "migrate"),
        "{planned:?}"
    );
    assert_eq!(planned.actions.len(), 3);
    assert!(planned.placement.values().all(|host| host != "h1"));
}

#[test]
fn old_and_new_names_of_fencing_mean_the_same() {
    for name in ["stonith-enabled", "fencing-enabled"] {
        let device = "<primitive id=\"power\" class=\"stonith\" type=\"fence_x\"/>";
        let text = cib_with(
            &format!("{device}{}", vm("a", &[])),
            "",
            [&runs("a"), "", ""],
        )
        .replace(
            "name=\"stonith-enabled\" value=\"false\"",
            &format!("name=\"{name}\" value=\"true\""),
        )
        .replacen(
            "in_ccm=\"true\" crmd=\"online\"",
            "in_ccm=\"false\" crmd=\"offline\"",
            1,
        );
        let deeds = deeds(&planned(&text));
        assert_eq!(
            deeds.first().map(String::as_str),
            Some("fence h1"),
            "{name}: {deeds:?}"
        );
        assert!(
            deeds.iter().any(|deed| deed.starts_with("start a -> ")),
            "{deeds:?}"
        );
    }
}

#[test]
fn without_fencing_an_unreachable_host_is_not_fenced() {
    let text = cib_with(&vm("a", &[]), "", [&runs("a"), "", ""]).replacen(
        "in_ccm=\"true\" crmd=\"online\"",
        "in_ccm=\"false\" crmd=\"offline\"",
        1,
    );
    assert_eq!(deeds(&planned(&text)), vec!["start a -> h2"]);
}

#[test]
fn failures_count_and_expire() {
    let failing = "<node_state id=\"1\"";
    let attributes = "<transient_attributes id=\"1\"><instance_attributes id=\"f\"><nvpair id=\"f1\" name=\"fail-count-a#monitor_10000\" value=\"3\"/><nvpair id=\"f2\" name=\"last-failure-a#monitor_10000\" value=\"1699999000\"/></instance_attributes></transient_attributes><lrm id=\"1\">";
    let text = |meta: &[(&str, &str)]| {
        let text = cib_with(&vm("a", meta), "", [&runs("a"), "", ""]);
        assert!(text.contains(failing));
        text.replacen("<lrm id=\"1\">", attributes, 1)
    };
    let sticky = ("resource-stickiness", "1");
    assert!(deeds(&planned(&text(&[sticky, ("migration-threshold", "4")]))).is_empty());
    let moved = deeds(&planned(&text(&[sticky, ("migration-threshold", "3")])));
    assert_eq!(moved, vec!["stop a h1", "start a -> h2"]);
    let expired = [
        sticky,
        ("migration-threshold", "3"),
        ("failure-timeout", "10min"),
    ];
    assert!(deeds(&planned(&text(&expired))).is_empty());
}

#[test]
fn results_of_operations() {
    let one = |events: &str| {
        let history = history("a", events);
        planned(&cib_with(
            &vm("a", &[("resource-stickiness", "1")]),
            "",
            ["", &history, ""],
        ))
    };
    // A check that found it running.
    assert!(deeds(&one(&event("a", "monitor", 0, 1, 0, 7))).is_empty());
    // It was stopped.
    let stopped = format!(
        "{}{}",
        event("a", "start", 0, 1, 0, 0),
        event("a", "stop", 0, 2, 0, 0)
    );
    assert_eq!(deeds(&one(&stopped)), vec!["start a -> h1"]);
    // A check that failed: it is restarted where it is.
    let failed = format!(
        "{}{}",
        event("a", "start", 0, 1, 0, 0),
        event("a", "monitor", 10_000, 2, 1, 0)
    );
    assert_eq!(deeds(&one(&failed)), vec!["stop a h2", "start a -> h2"]);
    // A stop that failed, with no fencing: nothing is touched.
    let stuck = format!(
        "{}{}",
        event("a", "start", 0, 1, 0, 0),
        event("a", "stop", 0, 2, 1, 0)
    );
    let planned = one(&stuck);
    assert!(deeds(&planned).is_empty());
    assert_eq!(planned.placement["a"], "h2");
    // The agent is not installed there.
    assert_eq!(
        deeds(&one(&event("a", "monitor", 0, 1, 5, 7))),
        vec!["start a -> h1"]
    );
}

#[test]
fn what_was_removed_from_the_configuration_is_stopped() {
    let text = cib_with(&vm("a", &[]), "", ["", &runs("gone"), ""]);
    assert!(deeds(&planned(&text)).contains(&"stop gone h2".to_owned()));
}

#[test]
fn maintenance_and_unmanaged_are_left_alone() {
    for meta in [
        ("is-managed", "false"),
        ("maintenance", "true"),
        ("target-role", "Started"),
    ] {
        let text = cib_with(
            &vm("a", &[meta]),
            "<rsc_location id=\"l\" rsc=\"a\" node=\"h1\" score=\"-INFINITY\"/>",
            [&runs("a"), "", ""],
        );
        let moved = !deeds(&planned(&text)).is_empty();
        assert_eq!(moved, meta.0 == "target-role", "{meta:?}");
    }
}

#[test]
fn unknown_names_are_told_with_their_place_and_what_may_have_been_meant() {
    let constraints = "\n<rsc_location id=\"l1\" rsc=\"a\" node=\"h9\" score=\"5\"/>\n<rsc_order id=\"o1\" first=\"a\" then=\"database1\"/>\n<rsc_location id=\"l2\" rsc=\"databases\" node=\"h1\" score=\"5\"/>";
    let resources = [vm("a", &[]), vm("database", &[])].concat();
    let text = cib_with(&resources, constraints, ["", "", ""]);
    let planned = planned(&text);
    let told = |problems: &[crate::Problem]| -> Vec<String> {
        let told = problems.iter().map(|one| {
            format!(
                "{} [{}]",
                one.message,
                one.hint.as_deref().unwrap_or_default()
            )
        });
        told.collect()
    };
    let expected = [
        "constraint \"l1\": there is no node \"h9\" []",
        "constraint \"o1\": there is no resource \"database1\" [did you mean \"database\"?]",
        "constraint \"l2\": there is no resource \"databases\" [did you mean \"database\"?]",
    ];
    assert_eq!(told(&planned.unknown), expected);
    assert!(planned.unknown.iter().all(|one| one.place.column == 1));
    let cib = super::read(&text, "cib.xml").unwrap();
    let converted = super::convert(&cib, "cib.xml", true, 0);
    assert_eq!(told(&converted.unknown), expected);
    // Those that leave them out find them in the report.
    let report = told(&converted.report);
    for one in expected {
        let one = one.replacen("\" [", "\": left out [", 1);
        assert!(report.contains(&one), "{report:?}");
    }
}

#[test]
fn what_is_not_supported_is_not_unknown() {
    let resources = format!(
        "{}<clone id=\"both\">{}</clone>",
        vm("a", &[]),
        vm("b", &[])
    );
    let constraints = "<rsc_order id=\"o1\" first=\"both\" then=\"a\"/><rsc_colocation id=\"c1\" rsc=\"a\" with-rsc=\"b\" score=\"5\"/>";
    let planned = planned(&cib_with(&resources, constraints, ["", "", ""]));
    assert!(planned.unknown.is_empty(), "{:?}", planned.unknown);
    assert_eq!(planned.warnings.len(), 2);
    assert!(
        planned.warnings[0]
            .message
            .contains("\"both\" is not supported")
    );
}

#[test]
fn contradictions_are_found_with_their_place() {
    let resources = ["a", "b", "c"].map(|id| vm(id, &[])).concat();
    let constraints = "\n<rsc_order id=\"o1\" first=\"a\" then=\"b\"/>\n<rsc_order id=\"o2\" first=\"b\" then=\"c\"/>\n<rsc_order id=\"o3\" first=\"c\" then=\"a\"/>\n<rsc_colocation id=\"c1\" rsc=\"a\" with-rsc=\"b\" score=\"INFINITY\"/>\n<rsc_colocation id=\"c2\" rsc=\"b\" with-rsc=\"a\" score=\"-INFINITY\"/>";
    let text = cib_with(&resources, constraints, ["", "", ""]);
    let planned = planned(&text);
    let found: Vec<&str> = planned
        .contradictions
        .iter()
        .map(|one| one.message.as_str())
        .collect();
    assert_eq!(
        found,
        vec![
            "order \"o3\" closes a circle: a then b then c then a",
            "colocation \"c2\" keeps \"a\" and \"b\" apart, \"c1\" keeps them together",
        ]
    );
    let line = text.lines().position(|line| line.contains("o3")).unwrap() + 1;
    assert_eq!(
        usize::try_from(planned.contradictions[0].place.line).unwrap(),
        line
    );
}

#[test]
fn what_is_not_supported_is_listed() {
    let resources = "<clone id=\"c\"><primitive id=\"p\" class=\"ocf\" type=\"x\"/></clone><bundle id=\"b\"/><primitive id=\"r\" class=\"ocf\" provider=\"pacemaker\" type=\"remote\"/>";
    let cib = read(
        &cib_with(
            resources,
            "<rsc_ticket id=\"t\" rsc=\"a\" ticket=\"T\"/>",
            ["", "", ""],
        ),
        "cib.xml",
    )
    .unwrap();
    assert_eq!(cib.unsupported.len(), 4, "{:?}", cib.unsupported);
}

fn load(converted: &Converted) -> quorate_types::Manifest {
    let existing = quorate_manifest::Existing::default();
    let loaded = quorate_manifest::load(&converted.manifest, "m.yaml", &BTreeMap::new(), &existing);
    loaded
        .unwrap_or_else(|error| panic!("{error}\n{}", converted.manifest))
        .manifest
}

#[test]
fn a_manifest_comes_out() {
    let resources = format!(
        "{}{}<group id=\"g\">{}{}</group><primitive id=\"ip\" class=\"ocf\" provider=\"heartbeat\" type=\"IPaddr2\"/>",
        vm("DB_1", &[("allow-migrate", "true"), ("priority", "7")]),
        vm("app", &[("target-role", "Stopped")]),
        vm("x", &[]),
        vm("yes", &[]),
    );
    let constraints = "<rsc_order id=\"o\" first=\"DB_1\" then=\"app\"/><rsc_colocation id=\"c\" rsc=\"app\" with-rsc=\"DB_1\" score=\"-INFINITY\"/><rsc_location id=\"l\" rsc=\"app\" node=\"h2\" score=\"-INFINITY\"/><rsc_location id=\"w\" rsc=\"app\" node=\"h3\" score=\"50\"/>";
    let cib = read(&cib_with(&resources, constraints, ["", "", ""]), "cib.xml").unwrap();
    let converted = convert(&cib, "cib.xml", false, NOW);
    let manifest = load(&converted);
    let names: Vec<&str> = manifest
        .vms
        .keys()
        .map(quorate_types::VmName::as_str)
        .collect();
    assert_eq!(names, vec!["app", "db-1", "x", "yes"]);
    let spec = |name: &str| &manifest.vms[&quorate_types::VmName::new(name).unwrap()];
    assert_eq!(spec("db-1").priority, 7);
    assert_eq!(
        spec("db-1").migration,
        quorate_types::spec::MigrationPolicy::Live
    );
    assert_eq!(spec("app").power, quorate_types::spec::Power::Stopped);
    assert_eq!(spec("app").depends_on.len(), 1);
    assert_eq!(spec("app").hosts.len(), 2);
    assert_eq!(spec("yes").depends_on.len(), 1);
    assert_eq!(manifest.rules.len(), 2);
    let report: Vec<&str> = converted
        .report
        .iter()
        .map(|note| note.message.as_str())
        .collect();
    for words in ["\"ip\" is no VM", "is called db-1"] {
        assert!(
            report.iter().any(|message| message.contains(words)),
            "{words}: {report:?}"
        );
    }
}

#[test]
fn wishes_become_weights_and_optional_orders_advice() {
    let resources = ["a", "b", "c"].map(|id| vm(id, &[])).concat();
    let constraints = "<rsc_order id=\"o\" first=\"a\" then=\"b\" kind=\"Optional\"/><rsc_colocation id=\"w\" rsc=\"b\" with-rsc=\"a\" score=\"50\"/><rsc_colocation id=\"r\" rsc=\"c\" with-rsc=\"a\" score=\"-INFINITY\" node-attribute=\"Room_Nr\"/><rsc_location id=\"l\" rsc=\"a\" node=\"h2\" score=\"INFINITY\"/><rsc_location id=\"m\" rsc=\"a\" node=\"h3\" score=\"-7\"/>";
    let text = cib_with(&resources, constraints, ["", "", ""])
        .replace("uname=\"h1\"/>", "uname=\"h1\"><instance_attributes id=\"i\"><nvpair id=\"i1\" name=\"Room_Nr\" value=\"East 1\"/></instance_attributes></node>")
        .replace("uname=\"h2\"/>", "uname=\"h2\"><instance_attributes id=\"j\"><nvpair id=\"j1\" name=\"Room_Nr\" value=\"West\"/></instance_attributes></node>");
    let cib = read(&text, "cib.xml").unwrap();
    let converted = convert(&cib, "cib.xml", false, NOW);
    let manifest = load(&converted);
    let a = &manifest.vms[&quorate_types::VmName::new("a").unwrap()];
    let weights: Vec<i32> = a.prefer.iter().map(|one| one.weight).collect();
    assert_eq!(weights, vec![100_000, -7]);
    let b = &manifest.vms[&quorate_types::VmName::new("b").unwrap()];
    assert!(b.depends_on.values().all(|one| one.advisory));
    let rule = |name: &str| &manifest.rules[&quorate_types::RuleName::new(name).unwrap()];
    assert_eq!(rule("w").weight, Some(50));
    assert!(rule("r").hard() && rule("r").across.is_some());
    assert!(
        converted.manifest.contains("room-nr: east-1"),
        "{}",
        converted.manifest
    );
}

#[test]
fn copies_of_a_vm_become_vms_that_are_kept_apart() {
    let clone = format!(
        "<clone id=\"farm\"><meta_attributes id=\"fm\"><nvpair id=\"fm1\" name=\"clone-max\" value=\"2\"/><nvpair id=\"fm2\" name=\"priority\" value=\"4\"/></meta_attributes>{}</clone>",
        vm("web", &[])
    );
    let cib = read(&cib_with(&clone, "", ["", "", ""]), "cib.xml").unwrap();
    let converted = convert(&cib, "cib.xml", false, NOW);
    let manifest = load(&converted);
    let names: Vec<&str> = manifest
        .vms
        .keys()
        .map(quorate_types::VmName::as_str)
        .collect();
    assert_eq!(names, vec!["web-1", "web-2"]);
    assert!(manifest.vms.values().all(|vm| vm.priority == 4));
    assert_eq!(manifest.rules.len(), 1);
    assert!(
        converted
            .report
            .iter()
            .any(|note| note.message.contains("becomes 2 VMs"))
    );
    assert!(
        !converted
            .report
            .iter()
            .any(|note| note.message == "clone \"farm\"")
    );
}

#[test]
fn a_manifest_never_contradicts_itself() {
    let resources = ["a", "b", "c"].map(|id| vm(id, &[])).concat();
    let constraints = "<rsc_order id=\"o1\" first=\"a\" then=\"b\"/><rsc_order id=\"o2\" first=\"b\" then=\"a\"/><rsc_colocation id=\"c1\" rsc=\"a\" with-rsc=\"b\" score=\"INFINITY\"/><rsc_colocation id=\"c2\" rsc=\"b\" with-rsc=\"a\" score=\"-INFINITY\"/><rsc_location id=\"l1\" rsc=\"a\" node=\"h1\" score=\"-INFINITY\"/><rsc_location id=\"l2\" rsc=\"a\" node=\"h2\" score=\"-INFINITY\"/><rsc_location id=\"l3\" rsc=\"a\" node=\"h3\" score=\"-INFINITY\"/>";
    let cib = read(&cib_with(&resources, constraints, ["", "", ""]), "cib.xml").unwrap();
    let converted = convert(&cib, "cib.xml", false, NOW);
    assert_eq!(load(&converted).rules.len(), 1);
    let report: Vec<&str> = converted
        .report
        .iter()
        .map(|note| note.message.as_str())
        .collect();
    for words in ["round in a circle", "left out", "no host at all"] {
        assert!(
            report.iter().any(|message| message.contains(words)),
            "{words}: {report:?}"
        );
    }
}

#[test]
fn passwords_and_odd_letters_survive() {
    let device = "<primitive id=\"f\" class=\"stonith\" type=\"fence_ipmilan\"><instance_attributes id=\"i\"><nvpair id=\"i1\" name=\"pcmk_host_list\" value=\"h1\"/><nvpair id=\"i2\" name=\"password\" value=\"a$b${C} &quot;\\: #\"/></instance_attributes></primitive>";
    let cib = read(&cib_with(device, "", ["", "", ""]), "ci\nb.xml").unwrap();
    let manifest = load(&convert(&cib, "ci\nb.xml", false, NOW));
    let fencing = &manifest.cluster.as_ref().unwrap().fencing;
    let device = &fencing[&quorate_types::HostName::new("h1").unwrap()][0];
    assert_eq!(device.options["password"], "a$b${C} \"\\: #");
}
