//! The circumstances, from the manifest; what the host did not tell is said to be unknown.

use maud::{Markup, html};
use reports_data::Role;

use crate::format::plural;
use crate::table::{Tools, head, table};
use crate::view::View;

pub(super) fn content(view: &View<'_>) -> Markup {
    let manifest = &view.run.manifest;
    let host = &manifest.host;
    let unknown = "unknown: the host does not tell";
    let or_unknown = |value: &Option<String>| value.clone().unwrap_or_else(|| unknown.into());
    let mut facts: Vec<(&str, Markup)> = Vec::new();
    let mut fact = |name, value: Markup| facts.push((name, value));
    fact(
        "Processor",
        html! {
            (or_unknown(&host.cpu_model))
            @if let Some(cpus) = host.cpus { ", " (cpus) " logical" }
            @if let Some(microcode) = &host.microcode { ", microcode " (microcode) }
            @if let Some(memory) = host.memory_mib { ", " (memory) " MiB memory" }
        },
    );
    fact("Kernel", html! { (or_unknown(&host.kernel)) });
    fact(
        "KVM backend",
        html! {
            @match manifest.kvm.backend.as_deref() {
                Some(backend) => { b { (backend) } @if !manifest.kvm.accessible { ", /dev/kvm not accessible" } },
                None => "none: no known KVM module is loaded",
            }
        },
    );
    fact("Clock source", html! { (or_unknown(&host.clocksource)) });
    fact("Frequency governor", html! { (or_unknown(&host.governor)) });
    fact(
        "Steal time",
        html! {
            @match (host.steal_ticks_before, host.steal_ticks_after) {
                (Some(before), Some(after)) => {
                    (plural(usize::try_from(after.saturating_sub(before)).unwrap_or(usize::MAX), "clock tick"))
                    " during the run, all processors together"
                },
                _ => (unknown),
            }
        },
    );
    fact(
        "Mitigations",
        html! {
            @if host.mitigations.is_empty() { (unknown) } @else {
                details {
                    summary { (plural(host.mitigations.len(), "entry").replace("entrys", "entries")) }
                    dl.inner {
                        @for (name, state) in &host.mitigations { dt { (name) } dd { (state) } }
                    }
                }
            }
        },
    );
    fact(
        "Source",
        html! {
            @match &manifest.source.revision {
                Some(revision) => code { (revision) },
                None => "unknown revision",
            }
            @match manifest.source.dirty {
                Some(true) => ", with local changes",
                Some(false) => ", clean",
                None => ", state unknown",
            }
        },
    );
    fact(
        "Build",
        html! {
            (or_unknown(&manifest.build.rustc)) ", profile " (manifest.build.profile)
        },
    );
    fact("Command", html! { code { (manifest.command.join(" ")) } });
    fact("Seed", html! { (manifest.seed) });
    fact(
        "Started",
        html! {
            (manifest.started) ", "
            @match manifest.duration_s {
                Some(duration) => { "took " (format!("{duration:.1}")) " s" },
                None => "cut off before its end",
            }
        },
    );
    if let Some(backing) = &manifest.backing {
        facts.push((
            "Disks",
            html! {
                (backing.disk_mib) " MiB each, files on " (or_unknown(&backing.filesystem)) ", "
                (backing.caching)
            },
        ));
        facts.push(("Network", html! { (backing.network) }));
    }
    for (tool, version) in &manifest.tools {
        facts.push(("Tool", html! { (tool) ": " (version) }));
    }
    html! {
        (warnings(view))
        dl.facts { @for (name, value) in &facts { dt { (name) } dd { (value) } } }
        (columns(view))
        (images(view))
    }
}

/// Circumstances that change how figures are to be read.
fn warnings(view: &View<'_>) -> Markup {
    let manifest = &view.run.manifest;
    let mut warnings = Vec::new();
    if manifest.kvm.backend.as_deref() == Some("pvm") {
        warnings.push(
            "The KVM backend of this host is pvm, which is software: no VMX or SVM stands behind \
             its figures, and they say nothing about hardware virtualization on bare metal.",
        );
    }
    if manifest.host.virtualized == Some(true) {
        warnings.push("This host is itself a virtual machine: others may take its processor time.");
    }
    if manifest.source.dirty == Some(true) {
        warnings.push("The source tree had local changes: the revision alone does not name what was measured.");
    }
    if manifest.build.profile != "release" {
        warnings.push("This was not a release build: times are not comparable with any other run.");
    }
    if manifest.duration_s.is_none() {
        warnings.push("The run was cut off: what was measured before is shown.");
    }
    html! {
        @if !warnings.is_empty() {
            ul.warnings { @for warning in &warnings { li { (warning) } } }
        }
    }
}

fn columns(view: &View<'_>) -> Markup {
    let modes = &view.run.manifest.modes;
    if modes.is_empty() {
        return html! {};
    }
    let role = |role: Role| match role {
        Role::Baseline => "baseline",
        Role::Mode => "mode",
        Role::Peer => "peer, a VMM that others wrote",
        Role::Floor => "no guest: what modes are held against",
    };
    table(
        "columns",
        "What was compared",
        Tools::Sort,
        html! { tr { (head("Shown as")) (head("Name in the data")) (head("Engine")) (head("Flavour")) (head("Role"))
        (head("Interrupt controllers")) (head("Doorbell")) } },
        html! {
            tbody {
                @for info in modes {
                    tr {
                        th scope="row" { (info.label) }
                        td { code { (info.name) } } td { (info.engine) } td { (info.flavour) }
                        td { (role(info.role)) }
                        td { (controllers(info.irqchip.as_deref())) }
                        td { (info.doorbell.as_deref().unwrap_or("–")) }
                    }
                }
            }
        },
    )
}

/// Whose interrupt controllers a column's guests have.
fn controllers(irqchip: Option<&str>) -> &str {
    match irqchip {
        Some("user") => "the VMM's",
        Some("kernel") => "the host kernel's",
        Some(other) => other,
        None => "–",
    }
}

fn images(view: &View<'_>) -> Markup {
    let images = &view.run.manifest.images;
    html! {
        @if !images.is_empty() {
            (table(
                "images",
                "Guest images",
                Tools::Sort,
                html! { tr { (head("Image")) (head("SHA-256")) } },
                html! {
                    tbody {
                        @for (name, hash) in images {
                            tr { th scope="row" { (name) } td { code.hash { (hash) } } }
                        }
                    }
                },
            ))
        }
    }
}
