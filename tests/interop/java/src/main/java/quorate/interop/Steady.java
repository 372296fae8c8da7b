package quorate.interop;

import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.TreeMap;
import org.apache.rocketmq.client.producer.DefaultMQProducer;
import org.apache.rocketmq.client.producer.SendResult;
import org.apache.rocketmq.client.producer.SendStatus;
import org.apache.rocketmq.common.message.Message;

/**
 * A stock producer with its default settings that sends one message after another until its time is up, while somebody kills
 * a leader. Arguments: name server, topic, seconds. Prints "ready" after the first acknowledgement and one JSON line at the end.
 */
public final class Steady {
    private Steady() {
    }

    public static void main(String[] args) throws Exception {
        DefaultMQProducer producer = new DefaultMQProducer("P_steady_" + args[1]);
        producer.setNamesrvAddr(args[0]);
        producer.start();
        long end = System.nanoTime() + Long.parseLong(args[2]) * 1_000_000_000L;
        int sent = 0;
        int failed = 0;
        long longestPause = 0;
        long last = System.nanoTime();
        Map<String, Integer> reasons = new TreeMap<>();
        while (System.nanoTime() < end) {
            try {
                byte[] body = ("steady-" + sent).getBytes(StandardCharsets.UTF_8);
                SendResult result = producer.send(new Message(args[1], body));
                if (result.getSendStatus() != SendStatus.SEND_OK) {
                    throw new IllegalStateException("status " + result.getSendStatus());
                }
                if (sent++ == 0) {
                    System.out.println("ready");
                    System.out.flush();
                } else {
                    longestPause = Math.max(longestPause, System.nanoTime() - last);
                }
                last = System.nanoTime();
            } catch (Exception error) {
                failed++;
                reasons.merge(error.getClass().getSimpleName(), 1, Integer::sum);
            }
            Thread.sleep(5);
        }
        longestPause = Math.max(longestPause, System.nanoTime() - last);
        Report.line("steady", failed == 0, longestPause / 1_000_000,
            "sent " + sent + ", failed " + failed + " " + reasons);
        producer.shutdown();
        System.exit(0);
    }
}
