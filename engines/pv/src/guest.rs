//! A guest from image to running parties.
//!
//! Order: the memory files are made and the image laid out; the zygote starts and hands over the
//! listener of user processes; K starts with that listener among its descriptors, shuts its jail and
//! hands over its own. From then on V answers K's calls ([`Guest::run`]).

use std::fs::File;
use std::io::{self};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use abi::hypercall::{self, ConsoleRing, SharedInfo, StartInfo, layout};
use engine_core::Unavailable;
use engine_core::host::console::Sink;
use engine_core::machine::{Source, Window};
use engine_core::memory::MemoryError;
use engine_core::tally::Count;

use crate::clock::Keeper;
use crate::console::Console;
use crate::count::Snapshot;
use crate::image::{self, Image, ImageError};
use crate::pages::{Shared, memory_file};
use crate::process::{self, Process};
use crate::rings::{Devices, Rings};
use crate::wire::{
    FILTER, Filter, Ledger, PAGE, Plan, SEGMENTS, SLOT_SIZE, Segment, StubPlan, k, k_fd, u_fd,
};
use crate::{Error, filter};

const MONITOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/monitor.elf"));
const STUB: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stub.elf"));

/// The largest signal frame that fits a user process's signal stack beside a fresh frame.
const SIGNAL_FRAME: u64 = 16 * 1024;

/// How a guest is tied to its host.
#[derive(Debug)]
pub struct Options {
    /// Console input.
    pub input: Source,
    /// Console output.
    pub output: Sink,
    /// End the run on SIGINT and SIGTERM. Blocks both in the calling thread.
    pub signals: bool,
    /// Devices behind rings in guest memory.
    pub devices: Devices,
    /// A defence that this guest does without.
    #[cfg(feature = "testing")]
    pub without: Option<Defence>,
}

impl Default for Options {
    /// No input, output kept in memory, signals left alone.
    fn default() -> Self {
        Options {
            input: Source::Bytes(Vec::new()),
            output: Sink::Memory(Vec::new()),
            signals: false,
            devices: Devices::default(),
            #[cfg(feature = "testing")]
            without: None,
        }
    }
}

/// What the controls of the attack tests remove, one at a time.
#[cfg(feature = "testing")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defence {
    /// K's jail.
    KernelJail,
    /// U's jail.
    UserJail,
    /// U's jail asks for the process's key.
    Key,
    /// The key is in registers alone.
    HiddenKey,
    /// What a signal frame says beside registers is replaced by K.
    CleanFrames,
    /// The command page is read-only to U.
    ReadOnlyCommands,
    /// Everything but gate and slot is unmapped in U.
    UnmappedStub,
    /// K believes notifications from the gate only.
    CheckedNotifications,
    /// Frames and tables are checked.
    CheckedTables,
    /// Pointers are checked.
    CheckedPointers,
    /// A user process sees its own slot only.
    OneSlot,
}

/// A guest whose parties are up. Dropping it ends them.
#[derive(Debug)]
pub struct Guest {
    pub(crate) kernel: Process,
    pub(crate) zygote: Process,
    /// By slot.
    pub(crate) users: Vec<Option<Process>>,
    /// User processes of spaces that are gone: killed, and not yet reaped.
    pub(crate) dying: Vec<Process>,
    /// K's calls.
    pub(crate) listener: OwnedFd,
    pub(crate) zygote_socket: UnixStream,
    pub(crate) wake: OwnedFd,
    pub(crate) bell: OwnedFd,
    pub(crate) timer: OwnedFd,
    pub(crate) signals: Option<OwnedFd>,
    pub(crate) events: Shared<SharedInfo>,
    pub(crate) ring: Shared<ConsoleRing>,
    pub(crate) ledger: Shared<Ledger>,
    pub(crate) console: Console,
    pub(crate) clock: Keeper,
    pub(crate) marks: crate::marks::Marks,
    pub(crate) started: Snapshot,
    pub(crate) rings: Rings,
}

/// Finds out whether this host can run guests: kernel interfaces only, no guest is started.
///
/// # Errors
/// What is missing, and how to mend it.
pub fn probe() -> Result<(), Unavailable> {
    let missing = |probe: &str, reason: String, fix: &str| {
        Err(Unavailable {
            probe: probe.into(),
            reason,
            fix: fix.into(),
        })
    };
    let action = libc::SECCOMP_RET_USER_NOTIF;
    // SECCOMP_GET_ACTION_AVAIL.
    // SAFETY: `action` is readable for the duration of the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, 2, 0, &raw const action) };
    if result != 0 {
        return missing(
            "seccomp(SECCOMP_GET_ACTION_AVAIL, SECCOMP_RET_USER_NOTIF)",
            io::Error::last_os_error().to_string(),
            "use a kernel with CONFIG_SECCOMP_FILTER, Linux 6.6 or newer",
        );
    }
    // SAFETY: reads the process's own auxiliary vector.
    let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) };
    if frame > SIGNAL_FRAME {
        return missing(
            "AT_MINSIGSTKSZ",
            format!("signal frames of {frame} bytes, at most {SIGNAL_FRAME} are provided for"),
            "report it: the signal stack has to grow for this processor",
        );
    }
    Ok(())
}

fn pair() -> Result<(UnixStream, UnixStream), Error> {
    UnixStream::pair().map_err(Error::host("socketpair"))
}

fn owned(operation: &'static str, fd: libc::c_int) -> Result<OwnedFd, Error> {
    if fd < 0 {
        return Err(Error::host(operation)(io::Error::last_os_error()));
    }
    // SAFETY: a descriptor that a call has just created, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn event(flags: libc::c_int) -> Result<OwnedFd, Error> {
    // SAFETY: plain numbers; the result is a new descriptor or an error.
    owned("eventfd", unsafe {
        libc::eventfd(0, libc::EFD_CLOEXEC | flags)
    })
}

/// Makes hand-overs on one CPU cheap: SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (Linux 6.6).
fn wake_synchronously(listener: &OwnedFd) -> Result<(), Error> {
    use std::os::fd::AsRawFd;
    /// SECCOMP_IOCTL_NOTIF_SET_FLAGS
    const SET_FLAGS: libc::Ioctl = 0x4008_2104u32 as libc::Ioctl;
    // SAFETY: plain numbers.
    if unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS, 1u64) } != 0 {
        return Err(Error::host("SECCOMP_IOCTL_NOTIF_SET_FLAGS")(
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}

/// Filters of both parties, and what the monitor and the stub leave out.
struct Jails {
    kernel: Filter,
    user: Filter,
    key: [u64; 2],
    relax: u64,
}

impl Options {
    fn jails(&self) -> Jails {
        let (user, key) = filter::user_jail(true);
        #[cfg_attr(
            not(feature = "testing"),
            allow(unused_mut, reason = "tests change it")
        )]
        let mut jails = Jails {
            kernel: filter::kernel_jail(),
            user,
            key,
            relax: 0,
        };
        #[cfg(feature = "testing")]
        {
            use crate::wire::relax;
            match self.without {
                None => {}
                Some(Defence::KernelJail) => jails.kernel = filter::open(jails.kernel),
                Some(Defence::UserJail) => {
                    (jails.user, jails.key) = (filter::open(jails.user), [0; 2]);
                }
                Some(Defence::Key) => (jails.user, jails.key) = filter::user_jail(false),
                Some(Defence::HiddenKey) => jails.relax = relax::SHOW_KEY,
                Some(Defence::CleanFrames) => jails.relax = relax::RAW_FRAMES,
                Some(Defence::ReadOnlyCommands) => jails.relax = relax::COMMANDS_WRITABLE,
                Some(Defence::UnmappedStub) => jails.relax = relax::KEEP_MAPPINGS,
                Some(Defence::CheckedNotifications) => jails.relax = relax::TRUST_NOTIFICATIONS,
                Some(Defence::CheckedTables) => jails.relax = relax::TRUST_TABLES,
                Some(Defence::CheckedPointers) => jails.relax = relax::TRUST_POINTERS,
                Some(Defence::OneSlot) => {
                    jails.relax = relax::ALL_SLOTS | relax::KEEP_MAPPINGS;
                }
            }
        }
        jails
    }
}

impl Guest {
    /// Loads `image` into `mib` MiB of fresh memory and brings its parties up.
    ///
    /// # Errors
    /// The image is bad, or the host refuses something; nothing is left behind.
    pub fn start(
        image: &[u8],
        mib: u64,
        command_line: &str,
        options: Options,
    ) -> Result<Self, Error> {
        let image = Image::parse(image)?;
        let info = start_info(command_line)?;
        let limit_mib = engine_core::memory::limit_mib();
        if mib == 0 {
            return Err(MemoryError::Empty.into());
        }
        if mib > limit_mib {
            return Err(MemoryError::TooLarge { mib, limit_mib }.into());
        }
        let ram_bytes = mib << 20;
        let ram = memory_file(c"trapline-guest-ram", ram_bytes)
            .map_err(Error::host("memfd for guest memory"))?;
        image.place(&ram, ram_bytes)?;
        let mut clock = Keeper::start();

        let file = |name, bytes| memory_file(name, bytes).map_err(Error::host("memfd_create"));
        let shared = file(c"trapline-shared", k::SHARED_SIZE)?;
        let slots = file(c"trapline-slots", k::SLOTS_SIZE)?;
        let stub_plan = file(c"trapline-stub-plan", PAGE)?;
        let jails = options.jails();

        let mut plan = view::<StubPlan>(&stub_plan, 0)?;
        plan.fill(StubPlan {
            calls: filter::user_calls(),
            jail: jails.user,
            key: jails.key,
            relax: jails.relax,
        });
        drop(plan);
        fill_plan(&shared, &image, ram_bytes, &jails)?;
        let mut page = view::<StartInfo>(&shared, 0)?;
        let info = finish(info, &image, ram_bytes);
        let frame = info.devices;
        page.fill(info);
        drop(page);
        let rings = Rings::new(options.devices, &ram, ram_bytes, frame)?;
        let offset = |address: u64| address - k::START_INFO;
        let events = view::<SharedInfo>(&shared, offset(k::SHARED_INFO))?;
        events
            .get()
            .upcall_mask
            .store(1, std::sync::atomic::Ordering::Relaxed);
        events
            .get()
            .mask
            .store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
        let ring = view::<ConsoleRing>(&shared, offset(k::CONSOLE))?;
        let ledger = view::<Ledger>(&shared, offset(k::LEDGER))?;
        ledger
            .get()
            .limit
            .store(u64::MAX, std::sync::atomic::Ordering::Relaxed);

        let (zygote_socket, theirs) = pair()?;
        let mut zygote = process::start(
            "trapline-u",
            c"trapline-stub",
            STUB,
            &[
                (slots.as_fd(), u_fd::SLOTS),
                (theirs.as_fd(), u_fd::SOCKET),
                (stub_plan.as_fd(), u_fd::PLAN),
                (ram.as_fd(), u_fd::MEMORY),
            ],
        )?;
        drop(theirs);
        let user_listener = hand_over("zygote", &zygote_socket, &mut zygote)?;
        wake_synchronously(&user_listener)?;

        let wake = event(0)?;
        let bell = event(libc::EFD_NONBLOCK)?;
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: plain numbers; the result is a new descriptor or an error.
        let timer = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        let timer = owned("timerfd_create", timer)?;
        // The kernel runs from its start on, whoever serves it when.
        clock.publish(&events.get().clock);
        let (kernel_socket, theirs) = pair()?;
        let mut kernel = process::start(
            "trapline-k",
            c"trapline-monitor",
            MONITOR,
            &[
                (shared.as_fd(), k_fd::SHARED),
                (ram.as_fd(), k_fd::RAM),
                (slots.as_fd(), k_fd::SLOTS),
                (user_listener.as_fd(), k_fd::LISTENER),
                (wake.as_fd(), k_fd::WAKE),
                (bell.as_fd(), k_fd::BELL),
                (timer.as_fd(), k_fd::TIMER),
                (theirs.as_fd(), k_fd::SOCKET),
            ],
        )?;
        drop(theirs);
        let listener = hand_over("kernel", &kernel_socket, &mut kernel)?;
        wake_synchronously(&listener)?;
        let signals = if options.signals {
            Some(signals()?)
        } else {
            None
        };
        Ok(Guest {
            kernel,
            zygote,
            users: (0..layout::MAX_SPACES).map(|_| None).collect(),
            dying: Vec::new(),
            listener,
            zygote_socket,
            wake,
            bell,
            timer,
            signals,
            events,
            ring,
            ledger,
            console: Console::new(options.input, options.output),
            clock,
            marks: crate::marks::Marks::default(),
            started: Snapshot::default(),
            rings,
        })
    }

    /// Calls `observer` with each window soon after it has closed.
    pub fn observe_windows(&mut self, observer: impl FnMut(&Window) + 'static) {
        self.marks.observer = Some(Box::new(observer));
    }

    /// Everything counted so far, zeros left out.
    pub fn totals(&self) -> Vec<Count> {
        Snapshot::take(self.ledger.get()).since(&self.started)
    }

    /// Console output, if it is kept in memory.
    pub fn console(&self) -> &[u8] {
        self.console.kept()
    }

    /// Process ids of the parties that live: the kernel's, the zygote's, then the user processes'.
    pub fn processes(&self) -> Vec<i32> {
        let users = self.users.iter().flatten().chain(&self.dying);
        let users = users.map(Process::pid);
        [self.kernel.pid(), self.zygote.pid()]
            .into_iter()
            .chain(users)
            .collect()
    }
}

fn view<T>(file: &File, offset: u64) -> Result<Shared<T>, Error> {
    // SAFETY: used with the types of wire.rs and of the ABI only, which are numbers and atomics; the
    // files are sealed, and have the pages that wire.rs says.
    unsafe { Shared::map(file, offset) }.map_err(Error::host("mapping a shared page"))
}

/// Receives a party's listener; a party that fails says why by its exit code.
fn hand_over(
    party: &'static str,
    socket: &UnixStream,
    process: &mut Process,
) -> Result<OwnedFd, Error> {
    process::receive_descriptor(socket).map_err(|error| Error::Party {
        party,
        how: match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("it {}", process.end()),
            _ => error.to_string(),
        },
    })
}

fn start_info(command_line: &str) -> Result<StartInfo, ImageError> {
    let mut info = StartInfo {
        magic: StartInfo::MAGIC,
        version: hypercall::VERSION,
        features: image::features(),
        frames: 0,
        first_free_frame: 0,
        first_image_frame: 0,
        direct_map: layout::DIRECT_MAP,
        hypercall_page: k::MONITOR,
        shared_info: k::SHARED_INFO,
        console: k::CONSOLE,
        command_line_length: command_line.len() as u64,
        command_line: [0; 2048],
        devices: 0,
    };
    let limit = info.command_line.len();
    info.command_line
        .get_mut(..command_line.len())
        .ok_or(ImageError::CommandLine {
            length: command_line.len(),
            limit,
        })?
        .copy_from_slice(command_line.as_bytes());
    Ok(info)
}

fn finish(mut info: StartInfo, image: &Image<'_>, ram: u64) -> StartInfo {
    info.frames = ram / PAGE;
    for segment in image.segments() {
        let end = (segment.offset + segment.length) / PAGE;
        info.first_free_frame = info.first_free_frame.max(end);
    }
    let first = image
        .segments()
        .iter()
        .map(|segment| segment.offset / PAGE)
        .min();
    info.first_image_frame = first.unwrap_or(0);
    // The devices' frame follows the image, where there is room for one.
    if info.first_free_frame < info.frames {
        info.features |= hypercall::feature::DEVICES;
        info.devices = info.first_free_frame;
        info.first_free_frame += 1;
    }
    info
}

fn fill_plan(shared: &File, image: &Image<'_>, ram: u64, jails: &Jails) -> Result<(), Error> {
    let segments = image.segments();
    let mut segment = [Segment::default(); SEGMENTS];
    segment[..segments.len()].copy_from_slice(&segments);
    let mut plan = view::<Plan>(shared, k::PLAN - k::START_INFO)?;
    plan.fill(Plan {
        ram,
        entry: image.entry,
        segments: segments.len() as u64,
        segment,
        calls: filter::kernel_calls(),
        jail: jails.kernel,
        relax: jails.relax,
    });
    const { assert!(size_of::<Filter>() == 8 + 8 * FILTER && SLOT_SIZE.is_multiple_of(PAGE)) };
    Ok(())
}

/// A descriptor of SIGINT and SIGTERM, which are blocked for it.
fn signals() -> Result<OwnedFd, Error> {
    // SAFETY: an all-zero set is valid, and is made an empty one first; plain numbers otherwise.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    owned("signalfd", fd)
}
