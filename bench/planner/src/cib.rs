//! The same site as a Pacemaker configuration, to compare with `crm_simulate`.
//!
//! Owns: a writer for measuring only; importing and exporting for people is elsewhere. Racks are
//! left out: Pacemaker has no counterpart for limits by node attribute between single resources.

use crate::site::{CPUS, SIZES_MIB, host_mib, host_name};
use std::fmt::Write as _;

/// The configuration with all nodes online and nothing running.
pub(crate) fn write(hosts: usize, vms: usize) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let mib = host_mib(hosts, vms);
    out.push_str("<cib crm_feature_set=\"3.16.2\" validate-with=\"pacemaker-3.9\" epoch=\"1\" num_updates=\"0\" admin_epoch=\"0\" have-quorum=\"1\" dc-uuid=\"1\">\n<configuration>\n<crm_config><cluster_property_set id=\"o\"><nvpair id=\"o1\" name=\"stonith-enabled\" value=\"false\"/><nvpair id=\"o2\" name=\"placement-strategy\" value=\"balanced\"/></cluster_property_set></crm_config>\n<nodes>\n");
    for n in 0..hosts {
        let (id, name) = (n + 1, host_name(n));
        writeln!(
            out,
            "<node id=\"{id}\" uname=\"{name}\"><utilization id=\"u{id}\"><nvpair id=\"um{id}\" name=\"memory\" value=\"{mib}\"/><nvpair id=\"uc{id}\" name=\"cpu\" value=\"512\"/></utilization></node>"
        )?;
    }
    out.push_str("</nodes>\n<resources>\n");
    for n in 0..vms {
        let (memory, cpus) = (SIZES_MIB[n % 4] + 64, CPUS[n % 3]);
        writeln!(
            out,
            "<primitive class=\"ocf\" provider=\"heartbeat\" type=\"Dummy\" id=\"v{n}\"><utilization id=\"vu{n}\"><nvpair id=\"vm{n}\" name=\"memory\" value=\"{memory}\"/><nvpair id=\"vc{n}\" name=\"cpu\" value=\"{cpus}\"/></utilization></primitive>"
        )?;
    }
    out.push_str("</resources>\n<constraints>\n");
    for n in (0..vms).filter(|n| n % 5 != 0) {
        let first = n - 1;
        writeln!(
            out,
            "<rsc_order id=\"order{n}\" first=\"v{first}\" then=\"v{n}\" kind=\"Mandatory\"/>"
        )?;
    }
    for n in (0..vms.saturating_sub(9)).step_by(10) {
        let pairs = [(0, 3), (0, 6), (3, 6)];
        for (a, b) in pairs.map(|(a, b)| (n + a, n + b)) {
            writeln!(
                out,
                "<rsc_colocation id=\"a{a}-{b}\" rsc=\"v{b}\" with-rsc=\"v{a}\" score=\"-INFINITY\"/>"
            )?;
        }
        let (a, b) = (n + 1, n + 2);
        writeln!(
            out,
            "<rsc_colocation id=\"w{n}\" rsc=\"v{b}\" with-rsc=\"v{a}\" score=\"INFINITY\"/>"
        )?;
    }
    out.push_str("</constraints>\n</configuration>\n<status>\n");
    for n in 0..hosts {
        let (id, name) = (n + 1, host_name(n));
        writeln!(
            out,
            "<node_state id=\"{id}\" uname=\"{name}\" in_ccm=\"true\" crmd=\"online\" join=\"member\" expected=\"member\"><lrm id=\"{id}\"><lrm_resources/></lrm></node_state>"
        )?;
    }
    out.push_str("</status>\n</cib>\n");
    Ok(out)
}
