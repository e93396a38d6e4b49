//! Who takes part in a comparison: modes, the native baseline, peers and floors, and how each is
//! started.
//!
//! Starts no virtual machine itself. Invariant: all contenders run the same program logic and speak the same
//! protocol; a name stands for one command line.

mod command;

use std::path::PathBuf;
use std::sync::Arc;

use reports_data::{FLOOR, ModeInfo, NATIVE, Role};

use crate::choices::{Doorbell, Irqchip};
use crate::devices::Devices;
use crate::process::CommandLine;
use crate::task::Task;
use crate::verdict::{Traits, software_backend};
use crate::vm::Launch;
use command::{MICROVM, PC, qemu, qemu_devices, trapline_devices, trapline_run};

/// Guest memory of every virtual machine in MiB.
pub const MEMORY_MIB: u32 = 256;

/// The engine whose host side may be no processor's virtualization.
const KVM: &str = "kvm";

/// Makes translated code count what it does, at the price of its speed.
pub(crate) const COUNT_PATHS: &str = "--count-paths";

/// The engine that the floors are the floors of.
const PV: &str = "pv";

/// The emulator that peers are made of.
pub const QEMU: &str = "qemu-system-x86_64";

/// Foreign virtual machine monitors.
pub const PEERS: &[&str] = &["qemu-tcg", "qemu-tcg-virtio", "qemu-kvm"];

/// Flavour with paravirtual drivers, and of the images that want virtio devices.
const HYBRID: &str = "hybrid";

/// One participant.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Value of column `mode`.
    pub name: String,
    /// What to show: carries the backend where KVM is involved.
    pub label: String,
    /// What runs the guest.
    pub engine: String,
    /// How the guest reaches its machine.
    pub flavour: String,
    /// What it is to the comparison.
    pub role: Role,
    /// How it is started.
    pub launch: Launch,
    /// Whose interrupt controllers its guests have, where somebody says.
    pub irqchip: Option<&'static str>,
    /// How its paravirtual drivers notify, where it has some.
    pub doorbell: Option<&'static str>,
    /// How its faults are read.
    pub traits: Traits,
    /// Asked for workloads that use devices and for nothing else: in all others it would be another
    /// contender under a second name.
    pub devices_only: bool,
    /// What its devices stand on; shared with nobody but its own copies.
    pub devices: Option<Arc<Devices>>,
}

/// What contenders are made from.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The binary `trapline`.
    pub trapline: PathBuf,
    /// A file that holds the unaware image, for peers.
    pub unaware_image: PathBuf,
    /// A file that holds the hybrid image, for peers.
    pub hybrid_image: PathBuf,
    /// What stands behind /dev/kvm on this host.
    pub kvm_backend: Option<String>,
    /// Whose interrupt controllers guests under KVM have.
    pub irqchip: Irqchip,
    /// How virtio drivers under KVM notify.
    pub doorbell: Doorbell,
}

/// No contender has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} {name:?}, known: {}", known.join(", "))]
pub struct UnknownContender {
    what: &'static str,
    name: String,
    known: Vec<&'static str>,
}

impl Contender {
    /// The mode called `name`, from the engines' registry, or the native baseline.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn mode(name: &str, parts: &Parts) -> Result<Contender, UnknownContender> {
        if name == NATIVE {
            return Ok(Contender {
                name: NATIVE.to_owned(),
                label: NATIVE.to_owned(),
                engine: NATIVE.to_owned(),
                flavour: NATIVE.to_owned(),
                role: Role::Baseline,
                launch: trapline_run(&parts.trapline, NATIVE, NATIVE, &[]),
                irqchip: None,
                doorbell: None,
                traits: Traits {
                    native: true,
                    ..Traits::default()
                },
                devices_only: false,
                devices: None,
            });
        }
        let mode = engines::find(name).ok_or_else(|| UnknownContender {
            what: "mode",
            name: name.to_owned(),
            known: mode_names(),
        })?;
        let kvm = mode.engine == KVM;
        let hybrid = mode.flavour == HYBRID;
        let irqchip = match mode.engine {
            KVM => Some(parts.irqchip.name()),
            PV => None,
            _ => Some(Irqchip::User.name()),
        };
        let doorbell = match mode.engine {
            PV => Some("hypercall"),
            KVM if hybrid => Some(parts.doorbell.name()),
            _ => hybrid.then_some(Doorbell::Exit.name()),
        };
        let mut choices = Vec::new();
        if parts.irqchip != Irqchip::default() && kvm {
            choices.extend(["--irqchip", parts.irqchip.name()]);
        }
        if parts.doorbell != Doorbell::default() && kvm && hybrid {
            choices.extend(["--doorbell", parts.doorbell.name()]);
        }
        Ok(Contender {
            name: name.to_owned(),
            label: if kvm {
                kvm_label(name, ", KVM", parts, &choices)
            } else {
                name.to_owned()
            },
            engine: mode.engine.to_owned(),
            flavour: mode.flavour.to_owned(),
            role: Role::Mode,
            launch: trapline_run(&parts.trapline, name, mode.flavour, &choices),
            irqchip,
            doorbell,
            traits: Traits {
                software_kvm: software_backend(parts.kvm_backend.as_deref()).filter(|_| kvm),
                ..Traits::default()
            },
            devices_only: false,
            devices: None,
        })
    }

    /// The peer called `name`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn peer(name: &str, parts: &Parts) -> Result<Contender, UnknownContender> {
        let install = Some(format!(
            "{QEMU} not installed: apt-get install qemu-system-x86"
        ));
        let unaware = "unaware";
        let (label, flavour, accelerator, software_kvm) = match name {
            "qemu-tcg" => ("QEMU TCG".to_owned(), unaware, "tcg", None),
            "qemu-tcg-virtio" => ("QEMU TCG, virtio".to_owned(), HYBRID, "tcg", None),
            "qemu-kvm" => (
                kvm_label("QEMU KVM", "", parts, &[]),
                unaware,
                "kvm",
                software_backend(parts.kvm_backend.as_deref()),
            ),
            _ => {
                return Err(UnknownContender {
                    what: "peer",
                    name: name.to_owned(),
                    known: PEERS.to_vec(),
                });
            }
        };
        let devices_only = flavour == HYBRID;
        Ok(Contender {
            name: name.to_owned(),
            label,
            engine: "qemu".to_owned(),
            flavour: flavour.to_owned(),
            role: Role::Peer,
            launch: match devices_only {
                true => qemu(&parts.hybrid_image, accelerator, MICROVM),
                false => qemu(&parts.unaware_image, accelerator, PC),
            },
            // QEMU has the kernel's unless it is told otherwise.
            irqchip: Some(if accelerator == "kvm" {
                "kernel"
            } else {
                "user"
            }),
            doorbell: None,
            traits: Traits {
                software_kvm,
                install,
                native: false,
            },
            devices_only,
            devices: None,
        })
    }

    /// The host's own operations, of which modes of that engine are made.
    pub fn floors(parts: &Parts) -> Contender {
        Contender {
            name: FLOOR.to_owned(),
            label: "floor".to_owned(),
            engine: "host".to_owned(),
            flavour: "host".to_owned(),
            role: Role::Floor,
            launch: Launch {
                command: CommandLine {
                    program: parts.trapline.display().to_string(),
                    args: vec!["floor".to_owned()],
                },
                counts_windows: false,
            },
            irqchip: None,
            doorbell: None,
            traits: Traits::default(),
            devices_only: false,
            devices: None,
        }
    }

    /// Whether a task is asked of it.
    pub fn is_asked(&self, task: Task) -> bool {
        task.is_for(self.role) && (!self.devices_only || task.uses_devices())
    }

    /// Whether it has a use for devices: all have but floors.
    pub fn takes_devices(&self) -> bool {
        match self.role {
            Role::Floor => false,
            Role::Baseline | Role::Mode | Role::Peer => true,
        }
    }

    /// Gives it devices, from its next start on.
    pub fn attach(&mut self, devices: Devices) {
        let arguments = match self.role {
            Role::Baseline | Role::Mode | Role::Floor => trapline_devices(&devices),
            Role::Peer => qemu_devices(&devices, self.flavour == HYBRID),
        };
        self.launch.command.args.extend(arguments);
        self.devices = Some(Arc::new(devices));
    }

    /// Whether it can count what its guest's code does by itself, with [`COUNT_PATHS`].
    pub fn counts_paths(&self) -> bool {
        self.role == Role::Mode && engines::find(&self.name).is_some_and(|mode| mode.translates())
    }

    /// Whether the floors say something about it.
    pub fn has_floors(&self) -> bool {
        self.engine == PV
    }

    /// What the manifest says of it.
    pub fn info(&self) -> ModeInfo {
        ModeInfo {
            name: self.name.clone(),
            label: self.label.clone(),
            engine: self.engine.clone(),
            flavour: self.flavour.clone(),
            role: self.role,
            irqchip: self.irqchip.map(str::to_owned),
            doorbell: self.doorbell.map(str::to_owned),
        }
    }
}

/// Names of all modes and the baseline, in the order to show them.
pub fn mode_names() -> Vec<&'static str> {
    let modes = engines::MODES.iter().map(|mode| mode.name);
    modes.chain([NATIVE]).collect()
}

/// A figure through KVM never stands without what stands behind /dev/kvm, nor without what was chosen
/// (`--irqchip kernel` and the like, as on the command line).
fn kvm_label(name: &str, joint: &str, parts: &Parts, choices: &[&str]) -> String {
    let chosen = choices.chunks(2).map(|choice| {
        let option = choice.join(" ");
        option.trim_start_matches('-').to_owned()
    });
    let within: Vec<String> = parts.kvm_backend.iter().cloned().chain(chosen).collect();
    match within.is_empty() {
        false => format!("{name}{joint} ({})", within.join(", ")),
        true => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::DiskCache;

    fn parts(backend: Option<&str>) -> Parts {
        Parts {
            trapline: "/bin/trapline".into(),
            unaware_image: "/images/unaware".into(),
            hybrid_image: "/images/hybrid".into(),
            kvm_backend: backend.map(str::to_owned),
            irqchip: Irqchip::default(),
            doorbell: Doorbell::default(),
        }
    }

    #[test]
    fn every_listed_name_is_a_contender_and_others_are_not() {
        let parts = parts(None);
        for name in &mode_names() {
            assert_eq!(
                Contender::mode(name, &parts).map(|c| c.name),
                Ok((*name).to_owned())
            );
        }
        for name in PEERS {
            assert_eq!(
                Contender::peer(name, &parts).map(|c| c.name),
                Ok((*name).to_owned())
            );
        }
        let error = Contender::mode("fast", &parts).expect_err("no such mode");
        let known = mode_names().join(", ");
        let message = format!("unknown mode \"fast\", known: {known}");
        assert_eq!(error.to_string(), message);
        assert!(Contender::peer("full", &parts).is_err());
    }

    #[test]
    fn devices_stand_on_every_command_line_that_takes_them() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let parts = parts(None);
        let named = |name: &str| match name {
            "qemu-tcg" | "qemu-tcg-virtio" => Contender::peer(name, &parts),
            _ => Contender::mode(name, &parts),
        };
        for name in [
            "full",
            "hybrid",
            "para",
            "native",
            "qemu-tcg",
            "qemu-tcg-virtio",
        ] {
            let mut contender = named(name).expect("known");
            assert!(contender.takes_devices(), "{name}");
            let devices = Devices::create(dir.path(), dir.path(), name, DiskCache::Host);
            let devices = devices.expect("writable");
            let (disk, peer) = (devices.disk(), devices.peer().to_owned());
            contender.attach(devices);
            for path in [disk, peer] {
                let path = path.display().to_string();
                let mut arguments = contender.launch.command.args.iter();
                assert!(arguments.any(|argument| argument.contains(&path)), "{name}");
            }
        }
        assert!(!Contender::floors(&parts).takes_devices());
    }

    #[test]
    fn kvm_columns_carry_their_backend() {
        let parts = parts(Some("pvm"));
        let hardware = Contender::mode("hardware", &parts).expect("known");
        assert_eq!(hardware.label, "hardware, KVM (pvm)");
        assert_eq!(hardware.traits.software_kvm.as_deref(), Some("pvm"));
        let peer = Contender::peer("qemu-kvm", &parts).expect("known");
        assert_eq!(peer.label, "QEMU KVM (pvm)");
        let tcg = Contender::peer("qemu-tcg", &parts).expect("known");
        assert_eq!(tcg.traits.software_kvm, None);
    }

    #[test]
    fn choices_stand_in_label_command_and_manifest_of_those_that_have_them() {
        let parts = Parts {
            irqchip: Irqchip::Kernel,
            doorbell: Doorbell::Eventfd,
            ..parts(Some("pvm"))
        };
        let hybrid = Contender::mode("hybrid", &parts).expect("known");
        assert_eq!(
            hybrid.label,
            "hybrid, KVM (pvm, irqchip kernel, doorbell eventfd)"
        );
        let args = hybrid.launch.command.args.join(" ");
        assert!(
            args.ends_with("--irqchip kernel --doorbell eventfd"),
            "{args}"
        );
        let info = hybrid.info();
        assert_eq!(info.irqchip.as_deref(), Some("kernel"));
        assert_eq!(info.doorbell.as_deref(), Some("eventfd"));
        let hardware = Contender::mode("hardware", &parts).expect("known");
        assert_eq!(hardware.label, "hardware, KVM (pvm, irqchip kernel)");
        assert_eq!(hardware.info().doorbell, None);
        for (name, irqchip, doorbell) in [
            ("full", Some("user"), None),
            ("hybrid-bt", Some("user"), Some("exit")),
            ("para", None, Some("hypercall")),
            ("native", None, None),
        ] {
            let other = Contender::mode(name, &parts).expect("known");
            assert_eq!(other.label, name);
            assert_eq!((other.irqchip, other.doorbell), (irqchip, doorbell));
            assert!(!other.launch.command.args.contains(&"--irqchip".to_owned()));
        }
    }

    #[test]
    fn disks_past_the_page_cache_are_so_for_everybody() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let parts = parts(None);
        let words = |mut contender: Contender, name: &str| {
            // Not every file system takes O_DIRECT: then there is nothing to attach.
            let devices = Devices::create(dir.path(), dir.path(), name, DiskCache::Direct).ok()?;
            contender.attach(devices);
            Some(contender.launch.command.args.join(" "))
        };
        for name in ["full", "native", "para"] {
            let contender = Contender::mode(name, &parts).expect("known");
            if let Some(words) = words(contender, name) {
                assert!(words.contains(",direct "), "{words}");
            }
        }
        let qemu = Contender::peer("qemu-tcg", &parts).expect("known");
        if let Some(words) = words(qemu, "qemu") {
            assert!(words.contains("cache=none"), "{words}");
        }
    }
}
