//! What this host's /dev/kvm can do, and which implementation is behind it.

use std::fmt;
use std::fs;
use std::path::Path;

use engine_core::Unavailable;
use kvm_ioctls::{Cap, Kvm};

/// The device that everything here goes through.
pub(crate) const DEVICE: &str = "/dev/kvm";
/// The only API version there is (api.rst 4.1).
const API_VERSION: i32 = 12;
/// What the engine can't do without.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];
/// KVM_CAP_BINARY_STATS_FD (api.rst 8.31): statistics are left out without it.
const BINARY_STATS: u64 = kvm_bindings::KVM_CAP_BINARY_STATS_FD as u64;

/// The implementation behind /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// VMX.
    Intel,
    /// SVM.
    Amd,
    /// kvm_pvm: ring 0 of the guest is emulated in software, no VMX or SVM is used.
    Pvm,
    /// None of the modules that are known here.
    Unknown,
}

impl Backend {
    /// The name that stands in labels.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Intel => "intel",
            Backend::Amd => "amd",
            Backend::Pvm => "pvm",
            Backend::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A host on which the engine can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The implementation behind /dev/kvm.
    pub backend: Backend,
    /// CPU flags that matter: `vmx`, `svm`.
    pub cpu_flags: Vec<String>,
    /// The kernel keeps statistics per vCPU (KVM_GET_STATS_FD).
    pub statistics: bool,
}

/// Finds out whether the engine can run here.
///
/// # Errors
/// [`Unavailable`]: which probe failed, what it said and how to mend it.
pub fn probe() -> Result<Host, Unavailable> {
    probe_device(Path::new(DEVICE))
}

/// As [`probe`], through another device node.
///
/// # Errors
/// As [`probe`].
pub fn probe_device(device: &Path) -> Result<Host, Unavailable> {
    open(device).map(|(_, host)| host)
}

/// Opens the device and checks it.
pub(crate) fn open(device: &Path) -> Result<(Kvm, Host), Unavailable> {
    let flags = cpu_flags();
    let shown = device.display();
    let failed = |probe: String, reason: String, fix: String| Unavailable { probe, reason, fix };
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes()).map_err(|error| {
        failed(
            format!("open {shown}"),
            error.to_string(),
            format!("use {DEVICE}"),
        )
    })?;
    let kvm = Kvm::new_with_path(&path).map_err(|error| {
        failed(
            format!("open {shown}"),
            std::io::Error::from_raw_os_error(error.errno()).to_string(),
            opening_fix(error.errno(), device, &flags),
        )
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(failed(
            format!("KVM_GET_API_VERSION on {shown}"),
            format!("version {version}, {API_VERSION} is needed"),
            format!("use a Linux kernel's own {DEVICE}"),
        ));
    }
    for &(capability, name) in REQUIRED {
        if !kvm.check_extension(capability) {
            return Err(failed(
                format!("KVM_CHECK_EXTENSION {name}"),
                "not supported".into(),
                "use a newer kernel".into(),
            ));
        }
    }
    let host = Host {
        backend: backend(&flags),
        cpu_flags: flags,
        statistics: kvm.check_extension_raw(BINARY_STATS) > 0,
    };
    Ok((kvm, host))
}

/// How to mend an open that failed with `errno`.
fn opening_fix(errno: i32, device: &Path, flags: &[String]) -> String {
    match errno {
        libc::EACCES | libc::EPERM => format!(
            "give this user access: sudo usermod -aG kvm $USER and log in again, or sudo chmod a+rw {}",
            device.display()
        ),
        libc::ENOENT | libc::ENODEV | libc::ENXIO => match flags.first().map(String::as_str) {
            Some("vmx") => "load the module: sudo modprobe kvm_intel".into(),
            Some("svm") => "load the module: sudo modprobe kvm_amd".into(),
            _ => "switch on VT-x or AMD-V in the firmware, or nested virtualization on the \
                      host of this virtual machine"
                .into(),
        },
        _ => "see the kernel log (dmesg | grep kvm)".into(),
    }
}

/// The flags of the first processor that say how it virtualizes.
fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags
        .into_iter()
        .flat_map(str::split_ascii_whitespace)
        .filter(|flag| matches!(*flag, "vmx" | "svm"))
        .map(str::to_owned)
        .collect()
}

fn backend(flags: &[String]) -> Backend {
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    // kvm_pvm runs beside a loaded but unusable kvm_intel on hosts without the CPU flag.
    if loaded("kvm_intel") && has("vmx") {
        Backend::Intel
    } else if loaded("kvm_amd") && has("svm") {
        Backend::Amd
    } else if loaded("kvm_pvm") {
        Backend::Pvm
    } else {
        Backend::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_what_to_load_or_switch_on() {
        let error = probe_device(Path::new("/nonexistent/kvm")).unwrap_err();
        assert_eq!(error.probe, "open /nonexistent/kvm");
        assert!(error.reason.contains("No such file"), "{error}");
        assert!(error.fix.contains("modprobe") || error.fix.contains("firmware"));
    }

    #[test]
    fn a_forbidden_device_says_how_to_get_access() {
        let fix = opening_fix(libc::EACCES, Path::new(DEVICE), &[]);
        assert!(fix.contains("usermod -aG kvm"), "{fix}");
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let error = probe_device(Path::new("/dev/null")).unwrap_err();
        assert!(error.probe.contains("KVM_GET_API_VERSION"), "{error}");
    }
}
