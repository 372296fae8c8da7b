package quorate.interop;

import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import org.apache.rocketmq.common.message.MessageExt;

/** What consumers were handed, in the order in which they were handed it. */
final class Inbox {
    private final List<MessageExt> messages = new ArrayList<>();

    synchronized void add(List<MessageExt> arrived) {
        messages.addAll(arrived);
        notifyAll();
    }

    synchronized List<MessageExt> all() {
        return new ArrayList<>(messages);
    }

    static String body(MessageExt message) {
        return new String(message.getBody(), StandardCharsets.UTF_8);
    }

    synchronized Set<String> bodies() {
        Set<String> found = new TreeSet<>();
        for (MessageExt message : messages) {
            found.add(body(message));
        }
        return found;
    }

    /** Waits until every wanted body is here; fails with what is missing when the time is up. */
    synchronized void await(Set<String> wanted, long seconds) throws InterruptedException {
        long end = System.nanoTime() + seconds * 1_000_000_000L;
        while (true) {
            Set<String> missing = new TreeSet<>(wanted);
            missing.removeAll(bodies());
            if (missing.isEmpty()) {
                return;
            }
            long left = (end - System.nanoTime()) / 1_000_000L;
            if (left <= 0) {
                throw new IllegalStateException("not within " + seconds + " s: " + missing);
            }
            wait(left);
        }
    }
}
