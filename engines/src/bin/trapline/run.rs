//! `trapline run`: one guest from image to exit status.
//!
//! What the command line names is checked before the host is: a bad image is a bad image on every
//! host and in every mode.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use engine_core::host::console::Sink;
use engine_core::loader::{Boot, Module};
use engine_core::machine::{Source, Window};
use engine_core::peripherals::Family;
use engine_core::{
    CpuState, Crew, Doorbell, GuestRam, Irqchip, Limits, Machine, MachineOptions, Unavailable, Vcpu,
};
use engines::jail::Jail;
use engines::{Mode, Runs};

use crate::conclude::{Last, conclude, report_end};
use crate::wire::{Counter, Event, Stats};
use crate::{cli, devices, lockstep, modules, native, say, status};

/// An engine that has not stopped this long after its time limit never will.
const GRACE: Duration = Duration::from_secs(5);

/// A workload as the console protocol orders it.
#[derive(Debug)]
pub(crate) struct Order {
    name: &'static str,
    size: u64,
    iterations: u64,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Order {
            name,
            size,
            iterations,
        } = self;
        write!(f, "{} {name} {size} {iterations}", abi::word::RUN)
    }
}

/// Runs what the arguments say.
pub(crate) fn run(arguments: &cli::Run) -> anyhow::Result<ExitCode> {
    let stats = Stats::open(arguments.stats_fd)?;
    let order = order(arguments)?;
    match engines::find(&arguments.mode) {
        Some(mode) => run_mode(mode, arguments, order.as_ref(), stats),
        None => {
            no_translator(cli::NATIVE, arguments)?;
            native::run(arguments, order.as_ref(), stats)
        }
    }
}

fn order(arguments: &cli::Run) -> anyhow::Result<Option<Order>> {
    let Some(name) = &arguments.guest.workload else {
        return Ok(None);
    };
    let Some(workload) = programs::find(name) else {
        let names: Vec<&str> = programs::CATALOGUE.iter().map(|known| known.name).collect();
        bail!(
            "no workload is called '{name}'; there are {}",
            names.join(", ")
        );
    };
    Ok(Some(Order {
        name: workload.name,
        size: arguments.size,
        iterations: arguments.iterations,
    }))
}

pub(crate) fn file(what: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{what} {}", path.display()))
}

/// Puts what the arguments name into guest memory; answers with the state that it starts in.
fn load(
    ram: &GuestRam,
    mode: &Mode,
    arguments: &cli::Run,
    command_line: &str,
) -> anyhow::Result<CpuState> {
    let Some(path) = &arguments.guest.kernel else {
        let image = image(mode, arguments)?;
        return Ok(engine_core::loader::load(ram, &image, command_line)?);
    };
    let kernel = file("kernel", path)?;
    let files = modules::read(&arguments.initrd)?;
    let modules: Vec<Module<'_>> = files.iter().map(modules::File::module).collect();
    let boot = Boot {
        name: &path.to_string_lossy(),
        command_line,
        modules: &modules,
        load_at: arguments.load,
        cpus: arguments.smp,
    };
    Ok(engine_core::loader::load_kernel(ram, &kernel, &boot)?)
}

fn image(mode: &Mode, arguments: &cli::Run) -> anyhow::Result<Cow<'static, [u8]>> {
    let Some(path) = &arguments.guest.image else {
        return Ok((mode.image)().into());
    };
    match path
        .to_str()
        .and_then(|text| text.strip_prefix(cli::BUILTIN))
    {
        Some(flavour) if flavour == mode.flavour => Ok((mode.image)().into()),
        Some(flavour) => bail!(
            "no built-in image '{flavour}' for mode {}; there is {}{}",
            mode.name,
            cli::BUILTIN,
            mode.flavour
        ),
        None => Ok(file("image", path)?.into()),
    }
}

fn run_mode(
    mode: &'static Mode,
    arguments: &cli::Run,
    order: Option<&Order>,
    mut stats: Stats,
) -> anyhow::Result<ExitCode> {
    let command_line = match order {
        Some(order) => order.to_string(),
        None => arguments.cmdline.clone().unwrap_or_default(),
    };
    let translator = translator(mode, arguments)?;
    if arguments.smp > mode.cpus {
        bail!(
            "mode {} runs guests of at most {} vCPU(s): --smp {} is too many",
            mode.name,
            mode.cpus,
            arguments.smp
        );
    }
    let boot = match mode.runs {
        Runs::Vcpu(boot) => boot,
        Runs::Processes if arguments.guest.kernel.is_some() => {
            bail!(
                "mode {} takes no bare-metal kernel: its guests know their host",
                mode.name
            )
        }
        Runs::Processes => {
            let image = image(mode, arguments)?;
            return run_processes(mode, arguments, &image, &command_line, stats);
        }
    };
    let ram = engine_core::memory::create(arguments.memory)?;
    let entry = load(&ram, mode, arguments, &command_line)?;

    let mut peripherals = devices::open(arguments, mode.family())?;

    let debug: Option<Box<dyn Write + Send>> = match &arguments.debug_console {
        Some(path) => {
            let file = fs::File::create(path);
            let file = file.with_context(|| format!("debug console {}", path.display()))?;
            Some(Box::new(file))
        }
        None => None,
    };

    let found = match (mode.probe)() {
        Ok(found) => found,
        Err(unavailable) => return Ok(report_unavailable(mode, &unavailable, &mut stats)),
    };
    let irqchip = Irqchip::from(arguments.irqchip);
    if irqchip == Irqchip::Kernel {
        match mode.kernel_irqchip.map(|probe| probe()) {
            Some(Ok(())) => {}
            Some(Err(unavailable)) => {
                return Ok(report_unavailable(mode, &unavailable, &mut stats));
            }
            None => bail!(
                "mode {} has no interrupt controllers in the kernel: leave out --irqchip",
                mode.name
            ),
        }
    }
    let doorbell = doorbell(mode, arguments, irqchip)?;
    let setup = engines::Setup {
        irqchip,
        cpus: arguments.smp,
        translator,
    };
    let reference = match arguments.lockstep {
        Some(which) => Some(lockstep::Reference::prepare(
            which, arguments, &ram, boot, setup,
        )?),
        None => None,
    };
    let mut vcpus = match boot(Arc::clone(&ram), setup).and_then(|mut vcpus| {
        vcpus[0].set_state(&entry)?;
        match reference {
            Some(reference) => reference.attach(vcpus, &ram, &entry),
            None => Ok(vcpus),
        }
    }) {
        Ok(vcpus) => vcpus,
        Err(error) => {
            return Ok(could_not_start(mode, &error, &mut stats));
        }
    };
    let vcpu = &mut vcpus[0];
    let mut machine = Machine::new(MachineOptions {
        input: Source::Descriptor(std::io::stdin().as_fd().try_clone_to_owned()?),
        output: Sink::Descriptor(std::io::stdout().as_fd().try_clone_to_owned()?),
        signals: true,
        controller: vcpu.controller(),
        debug,
        memory: engine_core::memory::regions(&ram),
        cpus: arguments.smp,
        command_line: command_line.to_string(),
        firmware: arguments.guest.kernel.is_some(),
    })?;
    if doorbell == Doorbell::Eventfd {
        peripherals.doorbells = vcpu.doorbells();
    }
    machine.attach(peripherals, &ram, vcpu.keeps_code())?;
    machine.limit_log(vcpu.kept_code());
    if arguments.smp == 1 {
        machine.post_writes(&mut **vcpu);
    }
    let crew = Crew::new(arguments.smp)?;
    if arguments.exit_port == cli::ExitPort::Raw {
        engine_core::devices::testdev::add(&mut machine)?;
    }
    stats.write(&Event::Start {
        mode: mode.name,
        engine: mode.engine,
        backend: found.backend,
        irqchip: Some(irqchip.name()),
        doorbell: (mode.family() == Family::Virtio).then_some(doorbell.name()),
        cpus: arguments.smp,
        memory_mib: arguments.memory,
    });
    let stats = Arc::new(Mutex::new(stats));
    machine.observe_windows(teller(&stats));
    if let Some(timeout) = arguments.timeout {
        watch(timeout);
    }
    let limits = limits(arguments);
    let jail = match arguments.lockstep {
        Some(cli::Reference::Hardware) => Jail::Kvm,
        Some(cli::Reference::Instructions) | None => mode.jail(),
    };
    if let Err(error) = engines::jail::enter(jail) {
        let error = format_args!("seccomp: {error}");
        return Ok(could_not_start(mode, &error, &mut lock(&stats)));
    }
    let mut ended = crew.drive(vcpus, machine, &limits);
    let mut all: Vec<&mut dyn Vcpu> = Vec::with_capacity(ended.vcpus.len());
    all.extend(
        ended
            .vcpus
            .iter_mut()
            .map(|vcpu| &mut **vcpu as &mut dyn Vcpu),
    );
    let counts = ended.machine.totals_of(&mut all);
    let last = Last {
        cpu: ended.cpu,
        state: ended.vcpus[ended.cpu].state().ok(),
    };
    let mut stats = lock(&stats);
    Ok(conclude(
        &ended.outcome,
        Some(&last),
        arguments,
        &mut stats,
        &counts,
    ))
}

/// What the arguments say of the translator.
fn translator(mode: &Mode, arguments: &cli::Run) -> anyhow::Result<bt::Options> {
    if !mode.translates() {
        no_translator(mode.name, arguments)?;
    }
    let default = bt::Options::default();
    Ok(bt::Options {
        code_cache: arguments.code_cache.unwrap_or(default.code_cache),
        count_paths: arguments.count_paths,
    })
}

/// Refuses options of the translator where there is none.
fn no_translator(mode: &str, arguments: &cli::Run) -> anyhow::Result<()> {
    for (given, option) in [
        (arguments.code_cache.is_some(), "--code-cache"),
        (arguments.count_paths, "--count-paths"),
        (arguments.lockstep.is_some(), "--lockstep"),
    ] {
        if given {
            bail!("mode {mode} translates nothing: leave out {option}");
        }
    }
    Ok(())
}

/// How doorbells are rung: as asked, or by exits where this host refuses anything else, which is said.
fn doorbell(mode: &Mode, arguments: &cli::Run, irqchip: Irqchip) -> anyhow::Result<Doorbell> {
    match (arguments.doorbell.into(), mode.eventfd_doorbells) {
        (Doorbell::Exit, _) => Ok(Doorbell::Exit),
        (Doorbell::Eventfd, None) => bail!(
            "mode {} has no doorbells that could be eventfds: leave out --doorbell",
            mode.name
        ),
        (Doorbell::Eventfd, Some(probe)) => match probe(irqchip) {
            Ok(()) => Ok(Doorbell::Eventfd),
            Err(unavailable) => {
                say(&format!("{unavailable}; doorbells are exits in this run"));
                Ok(Doorbell::Exit)
            }
        },
    }
}

fn lock(stats: &Mutex<Stats>) -> MutexGuard<'_, Stats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the counts of each window.
fn teller(stats: &Arc<Mutex<Stats>>) -> impl FnMut(&Window) + Send + 'static {
    let stats = Arc::clone(stats);
    move |window| {
        let counts = window.counts.iter().map(Counter::from).collect();
        lock(&stats).write(&Event::Window {
            seq: window.seq,
            counts,
        });
    }
}

fn limits(arguments: &cli::Run) -> Limits {
    Limits {
        timeout: arguments.timeout,
        max_exits: arguments.max_exits,
    }
}

/// As [`run_mode`] goes on, for an engine of processes.
fn run_processes(
    mode: &'static Mode,
    arguments: &cli::Run,
    image: &[u8],
    command_line: &str,
    mut stats: Stats,
) -> anyhow::Result<ExitCode> {
    pv::check(image)?;
    doorbell(mode, arguments, Irqchip::User)?;
    let devices = devices::open_rings(arguments)?;
    let found = match (mode.probe)() {
        Ok(found) => found,
        Err(unavailable) => return Ok(report_unavailable(mode, &unavailable, &mut stats)),
    };
    let options = pv::Options {
        input: Source::Descriptor(std::io::stdin().as_fd().try_clone_to_owned()?),
        output: Sink::Descriptor(std::io::stdout().as_fd().try_clone_to_owned()?),
        signals: true,
        devices,
        ..pv::Options::default()
    };
    let mut guest = match pv::Guest::start(image, arguments.memory, command_line, options) {
        Ok(guest) => guest,
        Err(error @ (pv::Error::Image(_) | pv::Error::Memory(_))) => return Err(error.into()),
        Err(error @ (pv::Error::Host { .. } | pv::Error::Party { .. })) => {
            return Ok(could_not_start(mode, &error, &mut stats));
        }
    };
    stats.write(&Event::Start {
        mode: mode.name,
        engine: mode.engine,
        backend: found.backend,
        irqchip: None,
        doorbell: None,
        cpus: arguments.smp,
        memory_mib: arguments.memory,
    });
    let stats = Arc::new(Mutex::new(stats));
    guest.observe_windows(teller(&stats));
    if let Some(timeout) = arguments.timeout {
        watch(timeout);
    }
    let outcome = guest.run(&limits(arguments));
    let counts = guest.totals();
    let mut stats = lock(&stats);
    Ok(conclude(&outcome, None, arguments, &mut stats, &counts))
}

fn could_not_start(mode: &Mode, error: &dyn fmt::Display, stats: &mut Stats) -> ExitCode {
    let message = format!("engine {} could not start: {error}", mode.engine);
    let code = ExitCode::from(status::CRASHED);
    report_end(stats, "crashed", &message, &[], code)
}

fn report_unavailable(mode: &Mode, unavailable: &Unavailable, stats: &mut Stats) -> ExitCode {
    let message = format!("mode {} is unavailable: {unavailable}", mode.name);
    let code = ExitCode::from(status::UNAVAILABLE);
    report_end(stats, "unavailable", &message, &[], code)
}

/// Ends the process should the engine itself be stuck: `--timeout` holds whatever happens.
pub(crate) fn watch(timeout: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(timeout.saturating_add(GRACE));
        say("time limit reached, and the engine does not stop: ended from outside");
        std::process::exit(status::LIMIT.into());
    });
}
