"""Wordings of contract clauses for the demo's training data; `common.data.demo` explains the notation."""

from common.data.demo_clauses import Part

_TEXTS = {
    "termination-for-convenience": """
        [who: Either party | {recipient} alone | {provider} alone] may terminate {agreement} at any time and without
        cause by giving written notice of {days}, in which case [pay: all work performed up to that date shall be
        paid for | no compensation of any kind shall be payable].

        Without having to state any reason, [who: each of the parties | only {recipient} | only {provider}] is entitled
        to bring {agreement} to an end on {days} prior written notice, and services already rendered
        [pay: remain chargeable | cease to be chargeable].

        {agreement} may be cancelled for convenience [who: by either side | by {recipient} but not by {provider} |
        by {provider} but not by {recipient}]; cancellation takes effect {days} after the notice is received, and
        [pay: payment is due | no payment is due] for what was completed by then.

        The right to withdraw from {agreement} for any reason or none belongs to [who: both parties | {recipient}
        exclusively | {provider} exclusively], is subject to {days} notice in writing, and is exercised
        [pay: against payment of | without payment of] the fees earned so far.
        """,
    "termination-for-breach": """
        If [who: {provider} | {recipient}] commits a material breach and fails to cure it within {days} of written
        notice, the other party may terminate {agreement} with immediate effect, and fees paid in advance
        [refund: shall be refunded pro rata | shall not be refunded].

        A material default by [who: {provider} | {recipient}] that is not remedied within {days} after notice entitles
        the other side to end {agreement} at once; prepaid amounts [refund: are to be returned for the unused term |
        may be kept in full].

        The innocent party may rescind {agreement} where [who: {provider} | {recipient}] has seriously failed in its
        obligations and has let a grace period of {days} pass, [refund: whereupon any advance is repaid |
        whereupon any advance is forfeited].

        Termination for cause is available against [who: {provider} | {recipient}] once {days} have gone by after a
        written demand to put an essential breach right, and it [refund: gives rise to | does not give rise to] a
        claim for repayment of sums paid beforehand.
        """,
    "confidentiality": """
        [who: Each party | {recipient} | {provider}] shall keep the other's confidential information secret for {years}
        after the end of {agreement} and [affiliates: may | may not] disclose it to its affiliates.

        For {years} following expiry of {agreement}, the duty of secrecy binds [who: both parties mutually |
        {recipient} only | {provider} only]; passing protected information on to group companies is
        [affiliates: permitted | prohibited].

        Confidential materials received under {agreement} must not be revealed to outsiders [who: by any party |
        by {recipient} | by {provider}] during a period of {years} after termination, and sister companies
        [affiliates: do not count as outsiders | count as outsiders].

        The obligation of non-disclosure is [who: owed by both sides | owed by {recipient} alone | owed by {provider}
        alone], outlasts {agreement} by {years}, and [affiliates: allows | does not allow] sharing with companies
        under common control.
        """,
    "limitation-of-liability": """
        The total liability of {provider} under {agreement} shall not exceed {amount}; liability for indirect and
        consequential loss [indirect: is included up to that sum | is excluded altogether], and the limit
        [gross: applies | does not apply] in cases of gross negligence.

        {provider} is liable up to a maximum of {amount} in the aggregate, [indirect: lost profits and other
        consequential damage included | lost profits and other consequential damage excluded], and this cap
        [gross: also covers | does not cover] grossly negligent conduct.

        In no event shall claims against {provider} arising from {agreement} go beyond {amount}; consequential damages
        [indirect: may be recovered | may not be recovered], and gross negligence [gross: is subject to the ceiling |
        is not subject to the ceiling].

        Damages payable by {provider} are capped at {amount}. {recipient} [indirect: can | cannot] claim for loss of
        profit or other indirect harm, and a grossly negligent act [gross: leaves the cap in place |
        lifts the cap].
        """,
    "indemnification": """
        [who: {provider} | {recipient}] shall indemnify and hold harmless the other party against third-party claims
        arising from [cause: infringement of intellectual property rights | bodily injury or damage to property |
        a violation of applicable law], up to {amount}.

        [who: {provider} | {recipient}] undertakes to defend the other party from any action brought by a third party on
        account of [cause: infringed patents or copyrights | personal injury or property damage | unlawful conduct],
        and to bear the resulting costs to the extent of {amount}.

        Where the other party is sued because of [cause: a breach of a third party's copyright or patent | harm to
        persons or things | non-compliance with statutory rules], [who: {provider} | {recipient}] will make good all
        losses and legal fees, limited to {amount}.

        Losses of up to {amount} which result from [cause: the use of protected rights of others | death, injury or
        damaged goods | disregard of mandatory law] and are asserted by outsiders shall be reimbursed to the
        other side by [who: {provider} | {recipient}].
        """,
    "governing-law": """
        {agreement} shall be governed by the laws of {place}, and any dispute shall be finally settled by [forum: the
        state courts | arbitration]; the United Nations sales convention [convention: applies | does not apply].

        The law of {place} governs {agreement}, [convention: including | excluding] the convention on the international
        sale of goods, and all controversies are to be [forum: brought before the ordinary courts |
        submitted to an arbitral tribunal].

        Any disagreement arising out of {agreement} will be decided by [forum: a court of law | arbitrators] under the
        substantive rules in force in {place}, and the parties [convention: opt into | opt out of] the uniform law
        on international sales.

        The parties choose {place} law for {agreement}; they [forum: submit to the jurisdiction of its courts | agree to
        refer their disputes to arbitration] and declare the Vienna sales convention [convention: applicable |
        inapplicable].
        """,
    "payment-terms": """
        {recipient} shall pay each invoice within {days} of [start: receipt of the invoice | delivery of the goods] and
        [setoff: may | may not] set off counterclaims against the amount due.

        Payment falls due {days} after [start: the invoice has been received | the goods have been delivered]; deduction
        of any counterclaim by {recipient} is [setoff: allowed | not allowed].

        The price is payable in full no later than {days} from the date on which [start: {recipient} receives the bill |
        {provider} hands over the goods], and {recipient} [setoff: is entitled | is not entitled] to offset
        its own claims.

        {provider} grants {recipient} a payment period of {days}, counted from [start: the arrival of the invoice |
        the completion of delivery], [setoff: with | without] the right to withhold sums that {provider} owes
        in turn.
        """,
    "late-payment-interest": """
        Overdue amounts shall bear interest at {percent} per annum from [start: the due date | the date of a written
        reminder] until payment, and {provider} [suspend: may | may not] suspend its services in the meantime.

        If {recipient} is late in paying, default interest of {percent} a year accrues as of [start: the day on which
        payment was due | receipt of a demand for payment]; stopping performance for that reason is
        [suspend: permitted | not permitted].

        {provider} is entitled to charge {percent} annual interest on any arrears, beginning [start: once the payment
        date has passed | once a formal reminder has been sent], and [suspend: to halt | but not to halt] further
        deliveries until the account is settled.

        Any sum in arrears carries interest of {percent} yearly, reckoned from [start: maturity of the debt | service of
        a payment notice], and such arrears [suspend: release {provider} from | do not release {provider} from]
        its duty to keep performing.
        """,
    "warranty": """
        {provider} warrants the goods against defects for {months} from delivery; {recipient}'s remedy is [remedy: repair
        or replacement | a refund of the price], and all implied warranties are [implied: preserved | excluded].

        During a warranty period of {months}, {provider} shall [remedy: mend or exchange | take back and reimburse]
        any faulty item, while warranties implied by statute [implied: remain in force | are disclaimed].

        Should a product prove defective within {months} after handover, {recipient} is entitled to [remedy: have it
        fixed or substituted | have its money returned], and implied terms as to quality [implied: apply |
        do not apply].

        The guarantee given by {provider} lasts {months} and consists in [remedy: putting right or renewing | paying back
        the cost of] defective goods; it is [implied: in addition to | in place of] any guarantee implied by law.
        """,
    "force-majeure": """
        Neither party is liable for delay caused by events beyond its control; [pay: this also suspends | this does not
        suspend] the duty to pay money, and after {days} [end: either party | only the unaffected party] may
        terminate {agreement}.

        If an event of force majeure continues for more than {days}, [end: each party | the party not affected by it] may
        end {agreement}; payment obligations are [pay: likewise excused | not excused] while the event lasts.

        War, flood, epidemic and similar events release the affected party from performance, [pay: payment of the price
        included | except for payment of the price]; once they have lasted {days}, {agreement} can be cancelled by
        [end: any party | the other party alone].

        The right to dissolve {agreement} after an impediment of {days} through unforeseeable circumstances belongs to
        [end: both parties | the party free of the impediment], and money owed [pay: need not | must still]
        be paid on time meanwhile.
        """,
    "assignment": """
        [who: {provider} | {recipient}] may assign its rights and duties under {agreement} to a third party
        [consent: only with the prior written consent | without the consent] of the other party, which must be
        informed {days} beforehand.

        A transfer of {agreement} by [who: {provider} | {recipient}] to another person [consent: requires | does not
        require] the approval of the other side and must be announced at least {days} ahead.

        [who: {provider} | {recipient}] is [consent: not free | free] to make over {agreement} to a successor at its own
        discretion; it shall give the other party {days} advance notice of any such transfer.

        Subject to {days} written notice, {agreement} can be handed on to a third person by [who: {provider} |
        {recipient}], [consent: provided that the other party agrees | whether or not the other party agrees].
        """,
    "non-compete": """
        For {months} after the end of {agreement}, {provider} shall not compete with {recipient} in {place}; it
        [staff: may | may not] hire or solicit employees of {recipient} during that time.

        {provider} agrees not to carry on a competing business in {place} for {months} after termination, while the
        recruitment of {recipient}'s staff is [staff: permitted | forbidden] throughout.

        Within {place}, and until {months} have passed since {agreement} expired, {provider} will refrain from offering
        rival services; approaching {recipient}'s personnel with job offers is [staff: allowed | not allowed].

        The restraint of trade accepted by {provider} covers {place}, runs for {months} from the last day of {agreement}
        and [staff: does not extend | extends] to enticing away workers of {recipient}.
        """,
    "data-protection": """
        {provider} shall report any personal data breach within {hours}, [transfer: may | may not] transfer personal data
        abroad, and shall [end: return | delete] all personal data when {agreement} ends.

        Security incidents that affect personal data must be notified to {recipient} within {hours}; processing outside
        the country is [transfer: permitted | prohibited], and at the end of {agreement} the data are to be
        [end: handed back | erased].

        As processor, {provider} will inform {recipient} of a data leak no later than {hours} after learning of it, is
        [transfer: authorised | not authorised] to export the data, and upon termination [end: gives the data back |
        destroys the data].

        {recipient}'s personal data [transfer: can be | must not be] stored in foreign countries; {provider} announces a
        breach inside {hours} and, once processing is over, [end: sends back every copy | wipes every copy].
        """,
    "intellectual-property": """
        All intellectual property in the deliverables shall vest in [owner: {provider} | {recipient}], and the other
        party receives [licence: an exclusive | a non-exclusive] licence to use them in {place}.

        [owner: {provider} | {recipient}] owns every right in the work results, while the other side is granted a licence
        for {place} that is [licence: exclusive | not exclusive].

        Title to copyrights and inventions made under {agreement} belongs to [owner: {provider} | {recipient}]; the other
        party may exploit them in {place}, [licence: to the exclusion of everyone else | alongside other licensees].

        Ownership of anything created in the course of {agreement} stays with [owner: {provider} | {recipient}]. In
        {place}, the other party enjoys [licence: a sole right | a shared right] of use.
        """,
    "audit-rights": """
        On {days} written notice, {recipient} may audit the books of {provider} [often: once | twice] in each calendar
        year, and the cost of the audit shall be borne by [cost: {provider} | {recipient}].

        {recipient} is entitled to inspect the records of {provider} [often: a single time | two times] a year, having
        given {days} notice; [cost: {provider} | {recipient}] pays for the inspection.

        {provider} shall open its accounts to an auditor named by {recipient} after {days} notice and
        [often: not more than once a year | every half-year]; the auditor's fees fall on
        [cost: {provider} | {recipient}].

        An [often: annual | half-yearly] examination of {provider}'s files at the expense of [cost: {provider} |
        {recipient}] is open to {recipient} whenever it has been announced {days} before.
        """,
    "renewal": """
        On expiry of the initial term, {agreement} [mode: shall renew automatically | shall renew only by written
        agreement] for a further {months}, and the fees shall [price: remain unchanged | be adjusted to the
        current price list].

        {agreement} is extended by {months} [mode: unless a party objects | if both parties sign an extension] before the
        term runs out; the price for the new period [price: stays the same | is set afresh].

        The term is prolonged for {months} at a time, [mode: tacitly and without further action | by express consent of
        both parties alone], on [price: the same rates | revised rates].

        Renewal for {months} happens [mode: by itself | not by itself but on a joint written decision] at the end of the
        current term, [price: with no change in | with a new calculation of] the charges.
        """,
}

TRAINING = Part(
    texts=_TEXTS,
    values={
        "amount": (50_000, 100_000, 200_000, 250_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 5_000_000),
        "days": (5, 7, 10, 14, 20, 21, 30, 60, 90, 120),
        "hours": (6, 10, 12, 20, 24, 36, 60, 72, 90, 96),
        "months": (2, 3, 6, 12, 14, 20, 24, 30, 36, 60),
        "percent": (2, 3, 5, 6, 7, 10, 12, 14, 20),
        "place": (
            *("California", "England", "Germany", "Ireland", "Italy", "Japan", "New York", "Ontario", "Singapore"),
            "Switzerland",
        ),
        "years": (2, 3, 5, 6, 7, 10, 12, 14, 20),
    },
    roles=(
        ("the Supplier", "the Customer"),
        ("the Provider", "the Client"),
        ("the Seller", "the Buyer"),
        ("the Manufacturer", "the Distributor"),
    ),
    agreements=("this Agreement", "this Contract"),
)
