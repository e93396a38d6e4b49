//! What a contender is asked for in a turn: a workload of the catalogue, or a floor of the host.
//!
//! Invariant: a floor is asked of the contender that has the floors, a workload of every other one.

use engines::floors::{self, Floor};
use programs::{Group, Workload};
use reports_data::{EMPTY, Role};

/// Iterations of a nano operation's cold run: enough for two clocks to see it, few enough that a
/// translator's or a hypervisor's first-time work still shows.
const COLD_NANO_ITERATIONS: u64 = 1000;

/// The same for a request to a device: one alone would drown in the marks.
const COLD_IO_ITERATIONS: u64 = 20;

/// One thing to measure.
#[derive(Clone, Copy, Debug)]
pub enum Task {
    /// A guest's program.
    Workload(&'static Workload),
    /// An operation of the host.
    Floor(&'static Floor),
}

impl From<&'static Workload> for Task {
    fn from(workload: &'static Workload) -> Self {
        Task::Workload(workload)
    }
}

impl Task {
    /// Every floor.
    pub fn floors() -> impl Iterator<Item = Task> {
        floors::FLOORS.iter().map(Task::Floor)
    }

    /// What measures the measurement, for a contender of that role.
    pub fn empty(role: Role) -> Option<Task> {
        match role {
            Role::Floor => Some(Task::Floor(&floors::EMPTY)),
            Role::Baseline | Role::Mode | Role::Peer => programs::find(EMPTY).map(Task::Workload),
        }
    }

    /// Its name on the console and in column `workload`.
    pub fn name(self) -> &'static str {
        match self {
            Task::Workload(workload) => workload.name,
            Task::Floor(floor) => floor.name,
        }
    }

    /// Whether it is asked of a contender of that role.
    pub fn is_for(self, role: Role) -> bool {
        match self {
            Task::Workload(_) => role != Role::Floor,
            Task::Floor(_) => role == Role::Floor,
        }
    }

    /// Iterations of the first run in a fresh machine.
    pub fn cold_iterations(self) -> u64 {
        match self {
            Task::Workload(workload) => match workload.group {
                Group::Nano => COLD_NANO_ITERATIONS,
                Group::Io => COLD_IO_ITERATIONS,
                Group::Compute | Group::Micro | Group::Empty => 1,
            },
            Task::Floor(_) => COLD_NANO_ITERATIONS,
        }
    }

    /// Whether it wants a disk, a network, or anything else that a machine has besides its processor.
    pub fn uses_devices(self) -> bool {
        match self {
            Task::Workload(workload) => match workload.group {
                Group::Io => true,
                Group::Compute | Group::Nano | Group::Micro | Group::Empty => false,
            },
            Task::Floor(_) => false,
        }
    }

    /// How many values the histogram of that many iterations must hold, if there is one; `None` for
    /// a task that has none.
    pub fn timed(self, iterations: u64) -> Option<u64> {
        match self {
            Task::Workload(workload) => workload.timed(0, iterations),
            Task::Floor(_) => None,
        }
    }

    /// Whether the first run says anything: a floor has neither guest nor translation to warm up.
    pub fn has_cold_phase(self) -> bool {
        match self {
            Task::Workload(_) => true,
            Task::Floor(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reports_data::held_against;

    #[test]
    fn floors_that_figures_are_held_against_are_measured() {
        let names: Vec<&str> = Task::floors().map(Task::name).collect();
        for aim in held_against::AIMS {
            assert!(programs::find(aim.workload).is_some(), "{}", aim.workload);
            if let Some(floor) = aim.floor {
                assert!(names.contains(&floor), "{floor}");
            }
        }
        for name in names {
            assert!(programs::find(name).is_none(), "{name} is two things");
        }
    }

    #[test]
    fn each_role_has_its_own_tasks() {
        let alu = Task::from(programs::find("alu").expect("in the catalogue"));
        for role in [Role::Baseline, Role::Mode, Role::Peer, Role::Floor] {
            assert_eq!(alu.is_for(role), role != Role::Floor);
            assert!(Task::floors().all(|floor| floor.is_for(role) == (role == Role::Floor)));
            assert_eq!(Task::empty(role).map(Task::name), Some(EMPTY));
        }
    }
}
