// The list of rules: everything that launches, descriptions and phases know of them is derived from
// it.
#pragma once

#include "rules/adafactor.h"
#include "rules/adam.h"
#include "rules/adopt.h"
#include "rules/came.h"
#include "rules/lion.h"
#include "rules/prodigy.h"
#include "rules/scaled.h"
#include "rules/schedule_free.h"
#include "rules/sgd.h"
#include "rules/sophia.h"

namespace engine {
namespace ENGINE_ISA {

// A rule; or two, the second for tensors whose second moment is factored.
template <class RuleT, class FactoredT = RuleT>
struct Entry {
    static constexpr const char* kName = RuleT::kName;

    template <class Function>
    HD static void visit(bool factored, Function&& f) {
        if constexpr (is_same<RuleT, FactoredT>) return f(RuleT());
        if (factored) return f(FactoredT());
        f(RuleT());
    }
};

template <class... Entries>
struct List {
    static constexpr int kCount = sizeof...(Entries);
    static constexpr const char* kNames[] = {Entries::kName...};

    // Calls f with the rule of this number.
    template <class Function>
    HD static void visit(int32_t number, bool factored, Function&& f) {
        int32_t at = 0;
        ((at++ == number ? Entries::visit(factored, f) : void()), ...);
    }
};

// In the order of RULES in optim/plan.py, which is compared with it when the module is imported.
using Rules = List<Entry<Sgd>, Entry<Adam>, Entry<Adopt>, Entry<Lion>,
                   Entry<AdafactorVector, AdafactorMatrix>, Entry<Sophia>, Entry<Curved>,
                   Entry<Prodigy>, Entry<LionProdigy>, Entry<CameVector, CameMatrix>,
                   Entry<ScheduleFree>, Entry<ProdigyScheduleFree>, Entry<Scaled>>;

}  // namespace ENGINE_ISA
}  // namespace engine
