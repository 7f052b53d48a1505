//! The OpenAPI 3.1 document. The committed copy is `crates/api/openapi.json`; a test compares.

use crate::routes;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Quorate",
        version = "1",
        description = "Keeps virtual machines running. Served on the unix socket DIR/api.sock.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    servers((url = "http://localhost", description = "Over the unix socket")),
    paths(
        routes::cluster,
        routes::list_hosts,
        routes::show_host,
        routes::drain_host,
        routes::label_host,
        routes::resume_host,
        routes::fence_host,
        routes::confirm_dead,
        routes::remove_host,
        routes::list_vms,
        routes::show_vm,
        routes::delete_vm,
        routes::start_vm,
        routes::stop_vm,
        routes::migrate_vm,
        routes::cancel_move,
        routes::accept_copy,
        routes::explain_vm,
        routes::vm_logs,
        routes::vm_console,
        routes::list_pools,
        routes::show_pool,
        routes::drill_pool,
        routes::take_unit,
        routes::delete_pool,
        routes::make_image_job,
        routes::list_image_jobs,
        routes::show_image_job,
        routes::cancel_image_job,
        routes::image_job_events,
        routes::list_image_snapshots,
        routes::list_services,
        routes::show_service,
        routes::delete_service,
        routes::drain_member,
        routes::resume_member,
        routes::trace_service,
        routes::delete_network,
        routes::delete_rule,
        routes::list_secrets,
        routes::set_secret,
        routes::delete_secret,
        routes::apply_manifest,
        routes::diff_manifest,
        routes::manifest_schema,
        routes::plan,
        routes::capacity,
        routes::balance,
        routes::save_state,
        routes::create_token,
        routes::show_quorum,
        routes::set_quorum,
        routes::events,
        routes::openapi,
        routes::metrics_text,
    ),
    tags(
        (name = "cluster", description = "The cluster as a whole"),
        (name = "hosts", description = "Hosts"),
        (name = "vms", description = "Virtual machines"),
        (name = "objects", description = "Pools, networks, rules and secrets"),
        (name = "services", description = "Addresses that are spread over VMs"),
        (name = "storage", description = "Pools in full and their images"),
        (name = "manifest", description = "What the operator wants"),
        (name = "questions", description = "What would happen; nothing is changed by asking"),
        (name = "events", description = "What happened"),
        (name = "meta", description = "About this API"),
    ),
)]
struct Document;

/// The document as pretty JSON.
#[must_use]
pub fn document() -> String {
    // The document is static data: it always serialises.
    Document::openapi().to_pretty_json().unwrap_or_default()
}
