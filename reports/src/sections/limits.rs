//! What the figures cannot say.

use maud::{Markup, html};
use reports_data::statistics::RESAMPLES;

use crate::view::View;

pub(super) fn content(view: &View<'_>) -> Markup {
    let backend = view.run.manifest.kvm.backend.as_deref();
    html! {
        ul.limits {
            li {
                "One host, one run. Times hold for this processor, kernel and clock source; two runs \
                on different hosts are not comparable by their figures alone."
            }
            li {
                "Time is host monotonic time between two lines on the guest's console, the window of an \
                empty workload subtracted. What the host does meanwhile (other processes, steal time, \
                frequency changes) is part of it. A figure near zero may be less than the window's own noise."
            }
            li {
                "Intervals are percentile bootstrap intervals of the median (" (RESAMPLES) " resamples, \
                fixed seed). They show the spread within this run, not between runs, and with few \
                samples they are narrower than they should be."
            }
            li {
                "A win is counted only where two intervals do not overlap. Many comparisons are made at \
                once and none is corrected for that: single small differences deserve a second run."
            }
            li {
                "A geometric mean weighs all workloads alike, and says over how many. Means over \
                different sets of workloads are not comparable."
            }
            li {
                "Nano operations run in a loop with warm caches and predictors: a lower bound for the \
                same operation in a real program."
            }
            li {
                "Counts of exits come from each engine's own choke point. A foreign VMM is not counted, \
                which does not mean that it has no exits."
            }
            @if backend == Some("pvm") {
                li {
                    "KVM is backed by pvm here: ring 0 of the guest is emulated in software. Nothing in \
                    a column marked (pvm) is a statement about VMX or SVM."
                }
            }
            li {
                "Workloads are small programs with one idea each. No operating system runs in the guest, \
                so scheduling and paging under pressure are not covered."
            }
            li {
                "Disks are files in a warm page cache, and the network's other end is a thread on this \
                host: figures are costs of devices and of the ways to them, not of media."
            }
            li {
                "A guest's latencies are read from its own time stamp counter, scaled as the guest has \
                calibrated it; a foreign clock can't be checked. Rates come from the host's clock."
            }
        }
    }
}
